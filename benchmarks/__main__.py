"""``python -m benchmarks``: every benchmark in a process of its own; 1 when a must is missed.

``--write docs/benchmarks.md`` also keeps what was printed, with the state of the machine.
"""

import argparse
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

MODULES = (
    "bench_agssd",
    "bench_anaus",
    "bench_dp",
    "bench_edges",
    "bench_cache",
    "bench_deploy",
    "bench_rounds",
    "bench_merge",
    "bench_regions",
    "bench_wire",
)
PACKAGES = ("torch", "monai", "flwr", "blosc2", "numpy")
CONTEXT = """# Benchmarks

Ratios of two things timed in turn in one run, equal results asserted first. Written by
`python -m benchmarks --write docs/benchmarks.md`; seconds are those of one machine and mean little.

"""


def main() -> int:
    """Run them all, echoing as they print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes; most promise nothing")
    parser.add_argument("--only", nargs="*", default=list(MODULES), help="names of modules")
    parser.add_argument("--write", type=Path, help="keep the output in this Markdown file")
    given = parser.parse_args()
    lines = [_machine()]
    print(lines[0])
    failed = [name for name in given.only if not _run(name, lines, quick=given.quick)]
    lines.append(f"missed: {', '.join(failed)}" if failed else "every must is met")
    print(lines[-1])
    if given.write is not None:
        given.write.write_text(CONTEXT + "```\n" + "\n".join(lines) + "\n```\n")
    return 1 if failed else 0


def _run(name: str, lines: list[str], *, quick: bool) -> bool:
    command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if quick else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    lines.append(f"\n[{name}]")
    print(lines[-1], flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        for line in child.stdout or ():
            lines.append(line.rstrip())
            print(lines[-1], flush=True)
    return child.returncode == 0


def _machine() -> str:
    load = os.getloadavg()[0]
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the start; "
        f"Python {platform.python_version()}, {packages}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
