"""Row 14: one of five sites poisons its updates, through real rounds of the toy.

What is measured is how far the merged student or teacher lies from the mean of the four honest
sites, in units of the honest site farthest from it: at most 1 is among the honest. Norm clipping
promises less, so it is held against its own promise: a step no longer than the longest honest one.
Plain averaging must fail, or the poison was none.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from faults.suite import Fault, Try
from faults.toys import quick_disk
from tests.support.poison import ATTACKS, excess_of, poisoned_run, reach_of

ROBUST = ("trimmed-mean", "median", "krum")


def held(student: str) -> Callable[[Path, int], Iterator[Try]]:
    """Each attack in turn, each time on other weights."""

    def run(folder: Path, tries: int) -> Iterator[Try]:
        with quick_disk():
            for number in range(tries):
                attack = list(ATTACKS)[number % len(ATTACKS)]
                one = poisoned_run(folder / str(number), student, attack, seed=number)
                if student in ROBUST:
                    worst = max(excess_of(one).values())
                    yield Try(worst <= 1 + 1e-5, f"{attack}: {worst:.2f}", {"excess": worst})
                else:
                    worst = max(reach_of(one).values())
                    yield Try(worst <= 1 + 1e-5, f"{attack}: {worst:.2f}", {"step": worst})

    return run


def led_away(folder: Path, tries: int) -> Iterator[Try]:
    """Plain averaging leaves the honest sites behind."""
    with quick_disk():
        for number in range(tries):
            attack = list(ATTACKS)[number % len(ATTACKS)]
            one = poisoned_run(folder / str(number), "fedavg", attack, seed=number)
            worst = max(excess_of(one).values())
            yield Try(worst > 1, f"{attack}: {worst:.2f}", {"excess": worst})


FAULTS = [
    *(
        Fault(14, f"one of five poisons: {rule} holds", held(rule), 30, short=len(ATTACKS))
        for rule in (*ROBUST, "norm-clip")
    ),
    Fault(14, "one of five poisons: plain averaging is led away", led_away, 30, short=len(ATTACKS)),
]
