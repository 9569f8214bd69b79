"""What a federated round costs beyond its training: 3 sites in process against plain training."""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from agssd_core.config import RunConfig, parse_config
from agssd_core.data.cache import SiteVolumes
from agssd_core.training.site_round import SiteTrainer
from agssd_core.weights import Weights
from server.store import RunStore
from simulation.engines import federate
from simulation.run import initialise, run_folder
from simulation.sites import build_sites

MUST_OVERHEAD = 0.05
TURNS = 3
MERGED_TOLERANCE = 1e-6


def configuration(folder: Path, *, steps: int) -> RunConfig:
    """One round of the tiny preset at the three default phantom sites, uniform weights."""
    return parse_config(
        {
            "name": f"steps-{steps}",
            "preset": "tiny",
            "output": str(folder),
            "federation": {
                "rounds": 1,
                "steps_per_round": steps,
                "min_sites": 3,
                "deadline_s": 3600,
                "merge": {"weighting": "uniform"},
            },
        }
    )


def plain(config: RunConfig, sites: dict[str, Path], base: Weights) -> tuple[float, list[Weights]]:
    """Open and train each site without a federation; seconds of it, and weights."""
    steps, seconds, trained = config.federation.steps_per_round, 0.0, []
    for name, folder in sorted(sites.items()):
        begun = time.perf_counter()
        trainer = SiteTrainer(config, SiteVolumes.open(folder, config.data), site=name, sites=3)
        trainer.load(base)
        trainer.train_steps(0, steps, config.federation.total_steps)
        seconds += time.perf_counter() - begun
        trained.append(trainer.shared_weights())
    return seconds, trained


def federated(config: RunConfig, sites: dict[str, Path]) -> tuple[float, Weights]:
    """The same round through messages, admission, merge and checkpoint; seconds, and weights."""
    folder, _ = initialise(config)
    begun = time.perf_counter()
    federate(config, sites, folder)
    return time.perf_counter() - begun, RunStore(folder).load(1).weights


def require_same(merged: Weights, trained: list[Weights]) -> None:
    """The round's weights are the mean of the three sites'."""
    for name, array in merged.items():
        mean = np.mean([weights[name] for weights in trained], axis=0, dtype=np.float64)
        np.testing.assert_allclose(array, mean, atol=MERGED_TOLERANCE, err_msg=name)


def run(*, quick: bool = False) -> bool:
    """Print the overhead; whether the must is met."""
    target_s = 2.0 if quick else 66.0
    with tempfile.TemporaryDirectory(prefix="bench-rounds-") as name:
        place = Path(name)
        trial = configuration(place / "trial", steps=8)
        sites = build_sites(trial, place / "sites", say=lambda _: None, bar=_silent)
        initialise(trial)
        base = RunStore(run_folder(trial)).load(0).weights
        plain(trial, sites, base)
        per_step = plain(trial, sites, base)[0] / 8
        steps = max(2, round(target_s / per_step))
        times: list[tuple[float, float]] = []
        for turn in range(1 if quick else TURNS):
            config = configuration(place / f"turn-{turn}", steps=steps)
            plain_s, trained = plain(config, sites, base)
            round_s, merged = federated(config, sites)
            require_same(merged, trained)
            times.append((round_s, plain_s))
    overhead = statistics.median(round_s / plain_s for round_s, plain_s in times) - 1
    round_s, plain_s = (statistics.median(column) for column in zip(*times, strict=True))
    missed = not quick and overhead > MUST_OVERHEAD
    print(
        f"in-process round of 3 sites vs the sum of its training: {overhead:+.1%} "
        f"({round_s:.1f} s vs {plain_s:.1f} s, {steps} steps a site; must "
        f"{'nothing at this size' if quick else f'{MUST_OVERHEAD:.0%}'})"
        f"{'  MISSED' if missed else ''}"
    )
    return not missed


@contextmanager
def _silent(_title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that shows nothing."""
    yield lambda _done, _total: None


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    logging.disable(logging.WARNING)
    return 0 if run(quick=parser.parse_args().quick) else 1


if __name__ == "__main__":
    raise SystemExit(main())
