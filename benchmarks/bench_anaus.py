"""ANAUS's step against its plain form, its memory, and its arithmetic beside the backbone's own.

Two forms of the same step are timed in turn in one run; before that their losses must agree.
Only the ratios mean anything: seconds are those of the machine and of whoever shares it.

    python -m benchmarks.bench_anaus [--quick] [--threads 1]
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from agssd_core.config import AnausConfig, parse_config
from agssd_core.training.anaus_build import build_lars, build_pair
from agssd_core.training.anaus_step import AnausLearner, Regions, draw_regions, train_step
from agssd_core.training.mixed_precision import has_bf16_arithmetic
from agssd_core.views.regions import present_ids
from agssd_core.views.us_batch import UsBatch
from benchmarks.bench_regions import label_maps
from benchmarks.naive_anaus import naive_step
from benchmarks.timing import Comparison, compare, report

SIZE = 224
MEMORY_MUST, MEMORY_STRETCH = 2.5, 3.0
FLOPS_MUST = 1.2
TOLERANCE = {False: 1e-4, True: 3e-2}


def settings() -> AnausConfig:
    """The paper's network: ResNet-18, BatchNorm, four scales, 16 anatomies a view."""
    config = parse_config({"preset": "small", "cohorts": ["us"], "anaus": {"batch_size": 8}})
    return config.for_cohort("us").anaus


def made_batch(frames: int) -> UsBatch:
    """Noise with maps of eight anatomies."""
    generator = torch.Generator().manual_seed(0)
    labels = label_maps(3 * frames)
    views, overlaps = labels[: 2 * frames], labels[2 * frames :]

    def noise(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, 1, SIZE, SIZE, generator=generator)

    return UsBatch(
        views=noise(2, frames),
        view_labels=views.unflatten(0, (2, frames)),
        view_ids=present_ids(views),
        damaged=noise(frames),
        clean=noise(frames),
        overlap_labels=overlaps,
        overlap_ids=present_ids(overlaps),
        valid=torch.ones(frames, dtype=torch.bool),
        overlap=torch.full((frames,), 0.5),
        boxes=torch.zeros(2, frames, 4, dtype=torch.float64),
        flipped=torch.zeros(2, frames, dtype=torch.bool),
        frame_index=torch.arange(frames),
    )


def drawn(batch: UsBatch, anaus: AnausConfig) -> tuple[Regions, ...]:
    """The anatomies that both forms use."""
    return draw_regions(batch, anaus, torch.Generator().manual_seed(0))


def our_step(anaus: AnausConfig, batch: UsBatch, *, bf16: bool = False) -> Callable[[], float]:
    """Our step, always with the same anatomies drawn."""
    pair = build_pair(anaus, seed=0)
    learner = AnausLearner(pair=pair, optimiser=build_lars(pair, anaus), anaus=anaus, bf16=bf16)

    def run() -> float:
        result = train_step(
            learner,
            batch,
            learning_rate=0.0,
            ema_momentum=0.99,
            generator=torch.Generator().manual_seed(0),
        )
        return result.loss.item()

    return run


def plain_step(anaus: AnausConfig, batch: UsBatch) -> Callable[[], float]:
    """The plain form on the same weights."""
    return naive_step(build_pair(anaus, seed=0), batch, drawn(batch, anaus), anaus)


def against_naive(frames: int, *, bf16: bool, repetitions: int) -> Comparison:
    """Forward, loss, backward and optimiser of both forms; their losses must agree."""
    anaus, batch = settings(), made_batch(frames)

    def same(naive: float, ours: float) -> None:
        if abs(naive - ours) > TOLERANCE[bf16] * abs(naive):
            raise AssertionError(f"losses differ: plain {naive:.6f}, ours {ours:.6f}")

    goals: tuple[float | None, float | None] = (7.0, 10.0) if bf16 else (5.0, 7.0)
    if frames < 8:
        goals = (None, None)
    return compare(
        f"ANAUS step, ResNet-18, {SIZE}, {frames} frames, "
        f"{'backbone bf16' if bf16 else 'fp32'}, vs plain fp32",
        plain_step(anaus, batch),
        our_step(anaus, batch, bf16=bf16),
        same=same,
        repetitions=repetitions,
        goals=goals,
    )


def flops_share() -> tuple[str, bool]:
    """FLOPs of a step over those of the backbone: three images a frame with and without grad."""
    anaus, batch = settings(), made_batch(2)
    step = our_step(anaus, batch)
    with FlopCounterMode(display=False) as whole:
        step()
    pair = build_pair(anaus, seed=0)
    images = torch.cat([batch.views.flatten(0, 1), batch.clean])
    with FlopCounterMode(display=False) as bare:
        sum(each.sum() for each in pair.student.maps(images)).backward()
        with torch.no_grad():
            pair.teacher.maps(images)
    share = whole.get_total_flops() / bare.get_total_flops()
    per_frame = bare.get_total_flops() / len(batch) / 1e9
    passed = share <= FLOPS_MUST
    line = (
        f"ANAUS FLOPs of a step over its backbone passes' ({per_frame:.1f} GFLOP a frame): "
        f"{share:.3f} (must at most {FLOPS_MUST:g}){'' if passed else '  MISSED'}"
    )
    return line, passed


def memory_ratio(frames: int) -> tuple[str, bool]:
    """Peak memory of one step of either form, each in a process of its own."""
    peaks = {}
    for form in ("import", "plain", "ours"):
        command = [sys.executable, "-m", "benchmarks.bench_anaus", "--peak", form]
        answer = subprocess.run(
            [*command, "--frames", str(frames)], check=True, capture_output=True, text=True
        )
        peaks[form] = float(answer.stdout.split()[-1])
    ratio = (peaks["plain"] - peaks["import"]) / (peaks["ours"] - peaks["import"])
    promised = frames >= 32
    passed = not promised or ratio >= MEMORY_MUST
    line = (
        f"ANAUS peak memory, {frames} frames, plain over ours: {ratio:.2f} x ({peaks['plain']:.2f} "
        f"vs {peaks['ours']:.2f} GB, of which {peaks['import']:.2f} GB interpreter and batch; "
        + (
            f"must {MEMORY_MUST:g} x, stretch {MEMORY_STRETCH:g} x)"
            if promised
            else "promises nothing)"
        )
        + ("" if passed else "  MISSED")
    )
    return line, passed


def print_peak(form: str, frames: int) -> None:
    """One step of a form, then this process's peak in GB."""
    anaus, batch = settings(), made_batch(frames)
    if form == "plain":
        plain_step(anaus, batch)()
    elif form == "ours":
        our_step(anaus, batch)()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def main() -> int:
    """Run every comparison; exit code 1 when a must is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two frames, little promised")
    parser.add_argument("--only", default="", help="lines whose names hold this text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", choices=("import", "plain", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--frames", type=int, default=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        print_peak(given.peak, given.frames)
        return 0
    if not has_bf16_arithmetic():
        print("this CPU has no bf16 arithmetic: bf16 products run on float32 kernels")
    cases = [(2, False)] if given.quick else [(8, False), (8, True), (32, False)]
    named = [(n, bf16, f"{n} frames {'bf16' if bf16 else 'fp32'}") for n, bf16 in cases]
    failed = 0
    for frames, bf16, name in named:
        if given.only in name:
            failed |= report([against_naive(frames, bf16=bf16, repetitions=3)])
    for name, measure in (
        ("flops", flops_share),
        ("memory", lambda: memory_ratio(2 if given.quick else 32)),
    ):
        if given.only in name:
            line, passed = measure()
            print(line, flush=True)
            failed |= int(not passed)
    return failed


if __name__ == "__main__":
    sys.exit(main())
