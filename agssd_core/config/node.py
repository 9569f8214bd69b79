"""The base of every configuration node, and helpers for its checks."""

import re
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

Size3 = tuple[int, int, int]
Spacing3 = tuple[float, float, float]
Range2 = tuple[float, float]
ScanModality = Literal["CT", "MR", "US"]


class Node(BaseModel):
    """A frozen part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def require(problems: Iterable[str]) -> None:
    """Raise one ``ValueError`` that holds every problem, a line each."""
    found = [problem for problem in problems if problem]
    if found:
        raise ValueError("\n".join(found))


def ordered(name: str, pair: Range2, low: float, high: float) -> str:
    """Say what is wrong with a (low, high) pair, or nothing."""
    if low <= pair[0] <= pair[1] <= high:
        return ""
    return f"{name} = {pair} must be two ascending numbers within [{low:g}, {high:g}]."


def within(name: str, value: float, low: float, high: float) -> str:
    """Say what is wrong with a number, or nothing."""
    if low <= value <= high:
        return ""
    return f"{name} = {value:g} lies outside [{low:g}, {high:g}]. Choose a value within it."


def name_problem(name: str) -> str:
    """Say what is wrong with a site's name, or nothing."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name):
        return ""
    return f"site name {name!r} may hold letters, digits, - and _ (40 at most)."
