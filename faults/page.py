"""The page that quotes the suite's table."""

from collections.abc import Sequence
from pathlib import Path

from faults.suite import Fault, Outcome

_MARK = "<!-- below: written by python -m faults --write -->"


def write_page(
    file: Path, outcomes: Sequence[Outcome], machine: str, faults: Sequence[Fault]
) -> None:
    """Put the table below what a hand wrote in the page; faults that were not run are named."""
    known = {(each.row, each.name) for each in faults}
    outcomes = [each for each in outcomes if (each.row, each.fault) in known]
    missing = known - {(each.row, each.fault) for each in outcomes}
    text = file.read_text(encoding="utf-8") if file.is_file() else "# Reliability\n\n"
    above = text.split(_MARK)[0].rstrip()
    failed = [each for each in outcomes if not each.met]
    passed, tried = (sum(getattr(each, name) for each in outcomes) for name in ("passed", "tried"))
    loads, dates = [each.load for each in outcomes], [each.date for each in outcomes]
    lines = [
        machine,
        f"from {min(dates)} to {max(dates)}; load of the machine {min(loads)} to {max(loads)}",
        *(each.line() for each in outcomes),
        f"{passed}/{tried} tries of {len(outcomes)} faults passed",
        f"failed: {len(failed)} fault(s)" if failed else "none failed",
        *(f"not run here: row {row}, {name}" for row, name in sorted(missing)),
    ]
    body = "\n".join(lines)
    file.write_text(f"{above}\n\n{_MARK}\n\n```\n{body}\n```\n", encoding="utf-8")
