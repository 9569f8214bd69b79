"""The private step against the ordinary one, of both methods: time and peak memory, as ratios.

Both take the same hidden tokens and the same losses; before anything is timed, the unclipped sum
of per-patient gradients must be the ordinary gradient. The private step also draws its noise.

    python -m benchmarks.bench_dp [--quick] [--threads 1]
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from agssd_core.config import RunConfig, parse_config
from agssd_core.noise import NoiseStream
from agssd_core.training.agssd_step import Learner
from agssd_core.training.build import build_model, build_optimiser
from agssd_core.training.distributed import ProcessGroup
from agssd_core.training.privacy.agssd_step import PrivateStep, StepSettings, resolve_private
from agssd_core.training.schedules import StepSchedule
from agssd_core.training.student_pass import StudentRule, student_terms
from benchmarks import private_anaus
from benchmarks.naive_agssd import random_batch
from benchmarks.timing import Comparison, compare, report

MODES = ("hooks", "fast-gradient-clipping")
# The weights stay as they are, so every repetition does the same.
RATES = StepSchedule(
    learning_rate=0.0,
    weight_decay=0.0,
    ema_momentum=1.0,
    teacher_temperature=0.04,
    beta=0.5,
    prototypes_frozen=False,
)
SETTINGS = StepSettings(RATES, step=1, alpha=2.0)


def configured(mode: str, *, quick: bool) -> RunConfig:
    """The tiny preset at 64 voxels with eight patients, or at 32 with four."""
    size, batch = (32, 4) if quick else (64, 8)
    return parse_config(
        {
            "preset": "tiny",
            "training": {"batch_size": batch},
            "agssd": {
                "eaam": {"kappa": 0},
                "cvac": {"global_size": [size] * 3, "local_size": [size // 2] * 3},
            },
            "privacy": {
                "enabled": True,
                "mode": mode,
                "expected_batch": batch,
                "max_grad_norm": 1e6,
            },
        }
    )


def made_learner(config: RunConfig) -> Learner:
    """Equal weights every time."""
    model = build_model(config.agssd, seed=0).train()
    return Learner(
        model=model,
        optimiser=build_optimiser(model, config.training.optimiser),
        agssd=config.agssd,
        training=config.training,
        resolved=resolve_private(config.agssd),
    )


def generators(count: int) -> list[torch.Generator]:
    """One a patient."""
    return [torch.Generator().manual_seed(number) for number in range(count)]


def private_way(config: RunConfig) -> Callable[[], Tensor]:
    """Clip, sum, noise, step; gives the mean gradient before the noise."""
    step, batch = PrivateStep(made_learner(config), config.privacy), random_batch(config)
    stream = NoiseStream.from_system()

    def run() -> Tensor:
        step.add(batch, SETTINGS, generators(len(batch)))
        mean = torch.cat([total.flatten() for total in step.clipped.totals()]) / len(batch)
        step.finish(SETTINGS, stream)
        return mean

    return run


def ordinary_way(config: RunConfig) -> Callable[[], Tensor]:
    """One backward pass of the batch's mean loss, and a step."""
    learner, batch = made_learner(config), random_batch(config)
    student = learner.model.student
    # For its preparation alone, which is the same in both ways; its hooks are on another model.
    helper = PrivateStep(made_learner(config), config.privacy)
    rule = StudentRule(learner.agssd, learner.resolved, RATES.beta, ProcessGroup())

    def run() -> Tensor:
        learner.optimiser.zero_grad(set_to_none=True)
        micro = helper.prepared(batch, SETTINGS, generators(len(batch)))
        terms = student_terms(
            student,
            micro,
            rule,
            autocast=learner.autocast(batch.globals_seen.device),
            generator=torch.Generator(),
        )
        terms["loss"].backward()
        learner.optimiser.step()
        learner.model.update_teacher(ema_momentum=1.0)
        return torch.cat([item.grad.flatten() for item in student.parameters()])

    return run


def same(one: Tensor, other: Tensor) -> None:
    """Equal up to float32."""
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def memory_growth(way: str, *, quick: bool) -> float:
    """MiB that two steps add to the peak of a process of their own."""
    command = [sys.executable, "-m", "benchmarks.bench_dp", "--peak", way]
    done = subprocess.run(
        [*command, *(["--quick"] if quick else [])], check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])


def print_peak(way: str, *, quick: bool) -> None:
    """Run two steps and print how far the peak rose."""
    run = _way(way, quick=quick)
    _reset_peak()
    before = _peak()
    run()
    run()
    print(_peak() - before)


def main() -> int:
    """Print the ratios; they promise nothing, 1 only when the gradients differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        print_peak(given.peak, quick=given.quick)
        return 0
    results: list[Comparison] = []
    for name, method in METHODS.items():
        for mode in MODES:
            config = method.configured(mode, quick=given.quick)
            results.append(
                compare(
                    f"{name}, ordinary step against private step, {mode}",
                    method.ordinary(config),
                    method.private(config),
                    same=same,
                    repetitions=3 if given.quick else 5,
                )
            )
    for name in METHODS:
        plain = memory_growth(f"{name}/ordinary", quick=given.quick)
        for mode in MODES:
            grown = memory_growth(f"{name}/{mode}", quick=given.quick)
            print(
                f"{name}, peak memory, {mode}: {grown / max(plain, 1):.2f} x the ordinary step's "
                f"({grown:.0f} MiB vs {plain:.0f} MiB)"
            )
    return report(results)


@dataclass(frozen=True)
class Method:
    """One of the two methods, with both ways of its step."""

    configured: Callable[..., RunConfig]
    ordinary: Callable[[RunConfig], Callable[[], Tensor]]
    private: Callable[[RunConfig], Callable[[], Tensor]]


METHODS = {
    "AG-SSD": Method(configured, ordinary_way, private_way),
    "ANAUS": Method(
        private_anaus.configured, private_anaus.ordinary_way, private_anaus.private_way
    ),
}


def _way(name: str, *, quick: bool) -> Callable[[], Tensor]:
    method, _, mode = name.partition("/")
    found = METHODS[method]
    if mode == "ordinary":
        return found.ordinary(found.configured(MODES[0], quick=quick))
    return found.private(found.configured(mode, quick=quick))


def _peak() -> float:
    """MiB; since the last reset on Linux, where a new process would inherit its parent's peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return float(lines[0].split()[1]) / 1024


def _reset_peak() -> None:
    """Start counting at what is in use now, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    raise SystemExit(main())
