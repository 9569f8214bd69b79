"""AG-SSD's step against its naive form and against the bare encoders and heads.

Two forms of the same step are timed in turn in one run; before that their losses must agree.
Only the ratios mean anything: seconds are those of the machine and of whoever shares it.

    python -m benchmarks.bench_agssd [--quick] [--threads 1]
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from agssd_core.config import RunConfig, parse_config
from agssd_core.training.agssd_step import Learner, StepRandomness, train_step
from agssd_core.training.build import build_model, build_optimiser, resolve
from agssd_core.training.schedules import StepSchedule
from agssd_core.views.batch import ViewBatch
from benchmarks.naive_agssd import bare_pass, naive_learner, naive_step, random_batch
from benchmarks.timing import Comparison, compare, report

RATES = StepSchedule(
    learning_rate=1e-4,
    weight_decay=0.04,
    ema_momentum=0.99,
    teacher_temperature=0.04,
    beta=0.5,
    prototypes_frozen=False,
)
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


@dataclass(frozen=True)
class Case:
    """One comparison: what is run, and what performance.md asks of the ratio."""

    name: str
    config: RunConfig
    repetitions: int
    must: float | None = None
    stretch: float | None = None


def configured(size: int, batch: int, precision: str, **agssd: dict[str, Any]) -> RunConfig:
    """The tiny preset at a cubic crop with patch size 8; two global and two local crops."""
    model = {"patch_size": 8, **agssd.pop("model", {})}
    crops = {"global_size": [size] * 3, "local_size": [size // 2] * 3, "n_local": 2}
    nodes = {"model": model, "cvac": crops, "eaam": {"unit": 2}, **agssd}
    training = {"batch_size": batch, "precision": precision}
    return parse_config({"preset": "tiny", "training": training, "agssd": nodes})


def small_8(precision: str) -> RunConfig:
    """ViT-S/8 at 96 voxels: the small preset's network and heads; one volume."""
    shape = {"width": 384, "depth": 12, "heads": 6, "decoder": "linear", "pos_embed": "learnable"}
    heads = {"prototypes": 4096, "hidden": 2048, "bottleneck": 256}
    return configured(96, 1, precision, model=shape, head=heads)


def tiny_8(precision: str) -> RunConfig:
    """The method's tiny network (linear decoder, learnt positions) at 64 voxels, four volumes."""
    shape = {"decoder": "linear", "pos_embed": "learnable"}
    return configured(64, 4, precision, model=shape)


def preset_8(precision: str) -> RunConfig:
    """The tiny preset as it is, with its transformer decoder, at 64 voxels, four volumes."""
    return configured(64, 4, precision)


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself; without, bf16 is emulated and slower than fp32."""
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def naive_cases(*, quick: bool) -> list[Case]:
    """The lines of performance.md, or one small one that promises nothing."""
    if quick:
        return [Case("tiny/8 32^3 fp32", configured(32, 2, "fp32"), 3)]
    bf16_goals = (1.6, 2.0) if has_bf16() else (None, None)
    return [
        Case("tiny/8 64^3 fp32", tiny_8("fp32"), 7, 1.15, 1.25),
        Case("tiny/8 64^3 bf16", tiny_8("bf16"), 7, *bf16_goals),
        Case("tiny preset 64^3 fp32", preset_8("fp32"), 5),
        Case("tiny preset 64^3 bf16", preset_8("bf16"), 5),
        Case("ViT-S/8 96^3 fp32", small_8("fp32"), 3, 1.6, 2.0),
        Case("ViT-S/8 96^3 bf16", small_8("bf16"), 3, *bf16_goals),
    ]


def bare_case(*, quick: bool) -> Case:
    """At most 1.35 times the bare passes."""
    if quick:
        return Case("tiny/8 32^3 fp32", configured(32, 2, "fp32"), 3)
    return Case("ViT-S/8 96^3 fp32", small_8("fp32"), 3, 1 / 1.35, 1 / 1.2)


def learner_for(config: RunConfig) -> Learner:
    """A fresh model with its optimiser."""
    model = build_model(config.agssd, seed=0, training=config.training).train()
    return Learner(
        model=model,
        optimiser=build_optimiser(model, config.training.optimiser),
        agssd=config.agssd,
        training=config.training,
        resolved=resolve(config.agssd, config.training.batch_size),
    )


def our_step(learner: Learner, batch: ViewBatch) -> Callable[[], float]:
    """Our step, always on the same masks."""

    def run() -> float:
        seeded = torch.Generator().manual_seed(0)
        result = train_step(
            learner, batch, RATES, step=50, alpha=2.0, randomness=StepRandomness(seeded, seeded)
        )
        return result.terms["loss"].item()

    return run


def against_naive(case: Case) -> Comparison:
    """Our step against the naive one in float32; their first losses must agree."""
    fp32 = case.config.training.model_copy(update={"precision": "fp32"})
    plain = case.config.model_copy(update={"training": fp32})
    batch = random_batch(case.config)
    limit = TOLERANCE[case.config.training.precision]

    def same(naive: float, ours: float) -> None:
        if abs(naive - ours) > limit * abs(naive):
            raise AssertionError(f"losses differ: naive {naive:.6f}, ours {ours:.6f}")

    return compare(
        f"AG-SSD step, {case.name}, vs naive fp32",
        naive_step(naive_learner(plain), batch, RATES),
        our_step(learner_for(case.config), batch),
        same=same,
        repetitions=case.repetitions,
        goals=(case.must, case.stretch),
    )


def against_bare(case: Case) -> Comparison:
    """Bare encoders and heads against our step; 1 / 1.35 is what the step may cost at most."""
    batch = random_batch(case.config)
    return compare(
        f"encoders and heads alone, {case.name}, as a share of the step",
        bare_pass(learner_for(case.config), batch),
        our_step(learner_for(case.config), batch),
        same=lambda *_: None,
        repetitions=case.repetitions,
        goals=(case.must, case.stretch),
    )


def main() -> int:
    """Run every comparison; exit code 1 when a must is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes only")
    parser.add_argument("--only", default="", help="cases whose names hold this text")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not has_bf16():
        print("this CPU has no bf16 arithmetic (avx512_bf16), so bf16 lines promise nothing")
    cases = [case for case in naive_cases(quick=given.quick) if given.only in case.name]
    results = [against_naive(case) for case in cases]
    bare = bare_case(quick=given.quick)
    if given.only in bare.name:
        results.append(against_bare(bare))
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
