"""One finding about a run, and how sites are named in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["good", "watch", "bad"]
_NAMED = 6


@dataclass(frozen=True)
class Verdict:
    """One finding: a level, a fact, a remedy, and the sites it is about."""

    level: Level
    fact: str
    remedy: str = ""
    sites: tuple[str, ...] = field(default=())


def named(names: Sequence[str]) -> str:
    """Up to six names, and how many more there are."""
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
