"""``python -m faults``: every fault of the reliability table, as often as its row says.

    python -m faults [--only 1,2] [--kind toy|deployed] [--tries N] [--short]
                     [--json FILE] [--write docs/reliability.md]

Prints a line for each fault and keeps it in a JSON lines file; 1 when anything failed. Runs of
single rows take the place of their lines in the file, so the page is written from all of them.
Rows over the real deployment need nginx; tmpfs for a full disk needs root, else a limit on the
size of files stands in.
"""

import argparse
import logging
import os
import platform
import sys
from importlib import import_module
from pathlib import Path

from agssd_core.processes import stopping_on_terminate
from faults.page import write_page
from faults.suite import Fault, Outcome, inject, keep

MODULES = (
    "client_kills",
    "server_kills",
    "disks",
    "payloads",
    "refusals",
    "doors",
    "archives",
    "poison",
    "poison_knn",
    "deployment",
    "deployed_server",
    "slow_link",
)


def all_faults() -> list[Fault]:
    """Those of every module, by row."""
    found = [fault for name in MODULES for fault in import_module(f"faults.{name}").FAULTS]
    return sorted(found, key=lambda fault: fault.row)


def main() -> int:
    """Inject what was asked for, echoing as it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows, separated by commas")
    parser.add_argument("--tries", type=int, default=0, help="instead of the row's own number")
    parser.add_argument("--short", action="store_true", help="one or two tries of what is quick")
    parser.add_argument("--kind", choices=("all", "toy", "deployed"), default="all")
    parser.add_argument("--json", type=Path, default=Path("runs/faults.jsonl"))
    parser.add_argument("--write", type=Path, help="quote the table in this Markdown file")
    given = parser.parse_args()
    rows = {int(row) for row in given.only.split(",") if row}
    logging.disable(logging.CRITICAL)  # refusals are what is wanted here
    with stopping_on_terminate():
        return run(given, rows)


def run(given: argparse.Namespace, rows: set[int]) -> int:
    """Every fault that was asked for, one after the other."""
    print(machine(), flush=True)
    failed = []
    for fault in sorted(all_faults(), key=lambda fault: fault.shared):
        tries = given.tries or (fault.short if given.short else fault.tries)
        if (rows and fault.row not in rows) or not tries:
            continue
        if given.kind != "all" and fault.deploy != (given.kind == "deployed"):
            continue
        outcome = inject(fault, tries)
        tell(outcome)
        failed += [] if outcome.met else [f"row {outcome.row}: {outcome.fault}"]
        kept = keep(given.json, [outcome])
        if given.write is not None:
            write_page(given.write, kept, machine(), all_faults())
    print(f"failed: {'; '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


def tell(outcome: Outcome) -> None:
    """Print a fault's line, and what failed below it."""
    print(outcome.line(), flush=True)
    for failure in outcome.failures:
        for line in failure.rstrip().splitlines():
            print(f"        {line}", flush=True)


def machine() -> str:
    """What this machine is, in a line."""
    load = os.getloadavg()[0]
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}; "
        f"Python {platform.python_version()}"
    )


if __name__ == "__main__":
    sys.exit(main())
