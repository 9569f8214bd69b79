"""What each form of travelling costs: how far a run ends from the same run in float32.

Three phantom sites, the tiny preset, three seeds. A distance is the L2 norm of the final merged
weights' difference, as a share of what the float32 run moved from its first weights. For
comparison, a float32 run whose first weights are off by one unit in the last place, and one
without the upload of teachers.

    python -m benchmarks.wire_cost [--quick]
"""

import argparse
import logging
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from agssd_core.config import RunConfig, parse_config
from agssd_core.differences import encode
from agssd_core.weights import Array, Weights, group
from server.manifest import RoundRecord
from server.store import RunStore
from simulation.compare.plan import MERGING
from simulation.engines import federate
from simulation.run import initialise, run_folder
from simulation.sites import build_sites

SEEDS = (0, 1, 2)
PLAIN, NUDGED = "float32", "float32, first weights off by one ulp"
ARMS: Mapping[str, tuple[str, ...]] = {
    PLAIN: (),
    NUDGED: (),
    "wire-bf16": MERGING["wire-bf16"],
    "wire-int8": MERGING["wire-int8"],
    "teacher-server-ema": MERGING["teacher-server-ema"],
}
PHANTOMS = [
    {"name": "north", "modalities": ["CT"], "patients": 6, "scanner": "a"},
    {"name": "coast", "modalities": ["MR"], "patients": 6, "scanner": "b"},
    {"name": "valley", "modalities": ["CT", "MR"], "patients": 4, "scanner": "c"},
]


def configuration(folder: Path, arm: str, *, seed: int, rounds: int, steps: int) -> RunConfig:
    """A run of one arm."""
    content = {
        "name": arm.split(",")[0] if arm != NUDGED else "nudged",
        "preset": "tiny",
        "seed": seed,
        "output": str(folder),
        "training": {"batch_size": 4},
        "federation": {"rounds": rounds, "steps_per_round": steps, "min_sites": 3},
        "simulation": {"phantoms": PHANTOMS},
    }
    return parse_config(content, ARMS[arm])


def train(config: RunConfig, sites: dict[str, Path], *, nudge: bool) -> RunStore:
    """Run a federation; its store."""
    initialise(config)
    store = RunStore(run_folder(config))
    if nudge:
        first = store.load(0)
        record = RoundRecord(first.manifest.run, 0, first.manifest.cohort, first.manifest.config)
        off = {name: np.nextafter(a, np.float32(np.inf)) for name, a in first.weights.items()}
        store.save_round(record, off)
    federate(config, sites, run_folder(config))
    return store


def distance(one: Weights, two: Weights, part: str) -> float:
    """L2 norm of the difference of one group's arrays."""
    return float(
        np.sqrt(
            sum(
                np.sum((array.astype(np.float64) - two[name]) ** 2)
                for name, array in group(one, part).items()
            )
        )
    )


def one_seed(
    folder: Path, sites: dict[str, Path], seed: int, *, rounds: int, steps: int
) -> dict[str, list[float]]:
    """Arm -> relative distance of student and of teacher."""
    plan = {"seed": seed, "rounds": rounds, "steps": steps}
    ends: dict[str, Weights] = {}
    for arm in ARMS:
        store = train(configuration(folder, arm, **plan), sites, nudge=arm == NUDGED)
        ends[arm] = store.load(rounds).weights
        if arm == PLAIN:
            start = store.load(0).weights
            if seed == SEEDS[0]:
                print_scales(start, store.load(1).weights)
    plain = ends[PLAIN]
    return {
        arm: [
            distance(end, plain, part) / distance(plain, start, part)
            for part in ("student", "teacher")
        ]
        for arm, end in ends.items()
        if arm != PLAIN
    }


def print_scales(base: Weights, merged: Weights) -> None:
    """Error of one merged difference, by where its int8 scales stand, without feedback."""
    names = sorted(group(base, "student") | group(base, "teacher"))
    differences = {n: merged[n].astype(np.float64) - base[n] for n in names}
    count = sum(array.size for array in differences.values())
    size = np.sqrt(sum(np.sum(array**2) for array in differences.values()))

    def show(label: str, coded: Mapping[str, Array], scales: int) -> None:
        error = np.sqrt(sum(np.sum((differences[n] - coded[n]) ** 2) for n in names))
        print(
            f"  {label:22s} error {error / size:.5f}, {1 + 4 * scales / count:.4f} bytes a weight"
        )

    print("one merged difference, its error relative to its size:")
    rows = {
        n: array.reshape(array.shape[0] if array.ndim else 1, -1) for n, array in _of(differences)
    }
    show("a scale a tensor row", *_by_rows(rows, differences))
    for block in (256, 128, 64, 32):
        padded = {n: _blocks(array, block) for n, array in _of(differences)}
        show(f"a scale a {block} weights", *_by_rows(padded, differences))
    wanted = {n: merged[n] for n in names}
    coded = encode(base, wanted, residual={}, wire="bf16").reached
    error = np.sqrt(sum(np.sum((merged[n].astype(np.float64) - coded[n]) ** 2) for n in names))
    print(f"  {'bf16':22s} error {error / size:.5f}, 2.0000 bytes a weight")


def _of(arrays: Mapping[str, Array]) -> list[tuple[str, Array]]:
    return sorted(arrays.items())


def _blocks(array: Array, block: int) -> Array:
    flat = array.ravel()
    return np.pad(flat, (0, -flat.size % block)).reshape(-1, block)


def _by_rows(rows: Mapping[str, Array], like: Mapping[str, Array]) -> tuple[dict[str, Array], int]:
    """Code every row with one float32 scale; the decoded arrays, and how many scales."""
    coded = {}
    for name, array in rows.items():
        scale = (np.abs(array).max(axis=1, keepdims=True) / 127).astype(np.float32)
        codes = np.rint(array / np.where(scale > 0, scale, np.inf))
        coded[name] = (codes * scale).ravel()[: like[name].size].reshape(like[name].shape)
    return coded, sum(len(array) for array in rows.values())


def run(*, quick: bool = False) -> None:
    """Print the table."""
    seeds, rounds, steps = ((0,), 2, 2) if quick else (SEEDS, 3, 3)
    found: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="wire-cost-") as name:
        place = Path(name)
        plan = configuration(place, PLAIN, seed=0, rounds=rounds, steps=steps)
        sites = build_sites(plan, place / "sites", say=lambda _: None, bar=_silent)
        for seed in seeds:
            part = place / str(seed)
            for arm, pair in one_seed(part, sites, seed, rounds=rounds, steps=steps).items():
                found.setdefault(arm, []).append(pair)
                print(
                    f"  seed {seed}, {arm}: student {pair[0]:.4f}, teacher {pair[1]:.4f}",
                    flush=True,
                )
    print(
        f"distance of the final weights from the float32 run's, as a share of what that run moved; "
        f"{rounds} rounds of {steps} steps, 3 sites, mean (and largest) of {len(seeds)} seed(s)"
    )
    for arm, pairs in found.items():
        columns = [list(column) for column in zip(*pairs, strict=True)]
        shown = ", ".join(
            f"{part} {statistics.mean(column):.4f} ({max(column):.4f})"
            for part, column in zip(("student", "teacher"), columns, strict=True)
        )
        print(f"  {arm:38s} {shown}")


@contextmanager
def _silent(_title: str) -> Iterator[object]:
    """A progress bar that shows nothing."""
    yield lambda _done, _total: None


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds")
    logging.disable(logging.WARNING)
    run(quick=parser.parse_args().quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
