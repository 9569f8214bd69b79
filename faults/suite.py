"""What a fault is, how often it is injected, and what is written down about it."""

import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class Try:
    """One injection and what came of it.

    Attributes:
        passed: the row's condition held.
        detail: what was found when it did not.
        figures: name with unit -> number, summed up over all tries.
    """

    passed: bool
    detail: str = ""
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """One fault of a row of the reliability table.

    Attributes:
        row: number in the table.
        name: what is done, in words.
        run: yields a ``Try`` for each injection; gets an empty folder and how many are wanted.
        tries: in a full run.
        short: in the short form; 0 leaves the fault out of it.
        deploy: starts the real deployment, or nginx.
        shared: uses the deployment of ``faults/deployment.py``, which trains until the end.
    """

    row: int
    name: str
    run: Callable[[Path, int], Iterable[Try]]
    tries: int
    short: int = 1
    deploy: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a fault."""

    row: int
    fault: str
    passed: int
    tried: int
    seconds: float
    load: float
    date: str
    figures: dict[str, list[float]]
    failures: list[str]

    @property
    def met(self) -> bool:
        """All tries passed, and there was one."""
        return 0 < self.tried == self.passed

    def line(self) -> str:
        """One line of the table."""
        told = [f"row {self.row:<2}  {self.fault:<58} {self.passed:>4}/{self.tried}"]
        told += [f"{name} {_span(values)}" for name, values in self.figures.items()]
        return "  ".join(told)


def inject(fault: Fault, tries: int) -> Outcome:
    """Inject a fault so many times; what raises counts as failed, with the tries left undone."""
    began, load = time.monotonic(), os.getloadavg()[0]
    found: list[Try] = []
    broken = ""
    with tempfile.TemporaryDirectory(prefix="agssd-faults-") as name:
        try:
            for one in fault.run(Path(name), tries):
                found.append(one)
        except Exception:  # noqa: BLE001 - whatever it is, the row failed and the next is run
            broken = traceback.format_exc(limit=-6)
    figures: dict[str, list[float]] = {}
    for one in found:
        for key, value in one.figures.items():
            figures.setdefault(key, []).append(round(float(value), 3))
    failures = [one.detail or "no detail" for one in found if not one.passed]
    return Outcome(
        row=fault.row,
        fault=fault.name,
        passed=sum(one.passed for one in found),
        tried=max(len(found) + bool(broken), tries),
        seconds=round(time.monotonic() - began, 1),
        load=round(load, 1),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        figures=figures,
        failures=([broken] if broken else []) + failures[:5],
    )


def keep(file: Path, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Write outcomes as JSON lines; those of other faults that the file holds stay."""
    kept = {(each.row, each.fault): each for each in [*read(file), *outcomes]}
    lines = [json.dumps(asdict(each)) for _, each in sorted(kept.items())]
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    temporary.replace(file)
    return [each for _, each in sorted(kept.items())]


def read(file: Path) -> list[Outcome]:
    """Outcomes that were kept before."""
    if not file.is_file():
        return []
    return [Outcome(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def _span(values: Sequence[float]) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    if low == high:
        return f"{low:g}"
    return f"{low:g}..{high:g} (median {middle:g})"
