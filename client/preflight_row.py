"""One line of a preflight: what was looked at, how it stands, what to do."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Row:
    """A check's answer.

    Attributes:
        level: ``fail`` keeps the site from taking part, ``warn`` may.
        found: no secret, no path of a scan, no identifier of a patient.
        remedy: what to do; empty when all is well.
    """

    name: str
    level: Level
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Row:
    """All is well."""
    return Row(name, "ok", found)


def warn(name: str, found: str, remedy: str) -> Row:
    """It may go wrong."""
    return Row(name, "warn", found, remedy)


def fail(name: str, found: str, remedy: str) -> Row:
    """It will go wrong."""
    return Row(name, "fail", found, remedy)
