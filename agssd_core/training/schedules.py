"""Every schedule, as a pure function of the global step.

The server sends the global step g = round * steps + s and the total G, so a late joiner, a
resumed run and a plain run all read the same values. Progress is g / G in [0, 1). The EMA
momentum, which the server needs too, is ``TeacherConfig.momentum_at``.
"""

import math
from dataclasses import dataclass

from agssd_core.config import AgssdConfig, OptimiserConfig
from agssd_core.config.agssd import CvaaConfig, TargetConfig


@dataclass(frozen=True)
class StepSchedule:
    """What one step uses; ``prototypes_frozen`` tells to zero the prototypes' gradients."""

    learning_rate: float
    weight_decay: float
    ema_momentum: float
    teacher_temperature: float
    beta: float
    prototypes_frozen: bool

    def metrics(self) -> dict[str, float]:
        """What is logged of a round's last step."""
        return {
            "learning_rate": self.learning_rate,
            "ema_momentum": self.ema_momentum,
            "teacher_temperature": self.teacher_temperature,
            "beta": self.beta,
        }


def schedule_at(
    agssd: AgssdConfig,
    optimiser: OptimiserConfig,
    *,
    base_learning_rate: float,
    step: int,
    total_steps: int,
    rewarm: float = 1.0,
) -> StepSchedule:
    """Gather every schedule's value at one global step.

    Args:
        agssd: the method's settings.
        optimiser: the optimiser's settings.
        base_learning_rate: peak learning rate (``build.base_learning_rate``).
        step: global step, counted from 0.
        total_steps: G, the steps of the whole run.
        rewarm: factor in (0, 1] on the learning rate after a lost optimiser.
    """
    rate = learning_rate(
        step,
        total_steps,
        peak=base_learning_rate,
        low=optimiser.min_learning_rate,
        warmup=optimiser.warmup,
    )
    return StepSchedule(
        learning_rate=rate * rewarm,
        weight_decay=cosine(
            step, total_steps, start=optimiser.weight_decay, end=optimiser.weight_decay_end
        ),
        ema_momentum=agssd.teacher.momentum_at(step, total_steps),
        teacher_temperature=teacher_temperature(agssd.target, step, total_steps),
        beta=fused_share(agssd.cvaa, step, total_steps),
        prototypes_frozen=step < frozen_steps(agssd.head.freeze, total_steps),
    )


def progress(step: int, total_steps: int) -> float:
    """Share of the run that lies before this step, held at 1 beyond its end."""
    return min(1.0, step / max(1, total_steps))


def cosine(step: int, total_steps: int, *, start: float, end: float) -> float:
    """Half a cosine from ``start`` at step 0 to ``end`` after the last step."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress(step, total_steps)))


def learning_rate(step: int, total_steps: int, *, peak: float, low: float, warmup: float) -> float:
    """Linear warm-up over the share ``warmup`` of all steps, then a cosine down to ``low``.

    The first step already moves: step s of w warm-up steps uses (s + 1) / w of the peak.
    """
    warm_steps = round(warmup * total_steps)
    if step < warm_steps:
        return peak * (step + 1) / warm_steps
    low = min(low, peak)
    return cosine(step - warm_steps, total_steps - warm_steps, start=peak, end=low)


def teacher_temperature(target: TargetConfig, step: int, total_steps: int) -> float:
    """Linear ramp over the first ``teacher_temperature_ramp`` of all steps, constant after."""
    start, end = target.teacher_temperature, target.teacher_temperature_end
    return _ramp(
        progress(step, total_steps), 0.0, target.teacher_temperature_ramp, start=start, end=end
    )


def fused_share(cvaa: CvaaConfig, step: int, total_steps: int) -> float:
    """Beta, the weight of the fused patch term: 0 before ``beta_start``, full from ``beta_end``."""
    if cvaa.mode != "fuse":
        return 0.0
    done = progress(step, total_steps)
    return _ramp(done, cvaa.beta_start, cvaa.beta_end, start=0.0, end=cvaa.beta)


def frozen_steps(share: float, total_steps: int) -> int:
    """Steps at the start during which prototypes stay as they were drawn (at least 1 if any)."""
    return math.ceil(share * total_steps)


def rewarm_factor(step: int, born: int, rewarm_steps: int) -> float:
    """Learning-rate factor for an optimiser that lost its state and began anew at step ``born``.

    An optimiser born at step 0 is in the run's own warm-up and needs no other.
    """
    if born == 0 or rewarm_steps == 0:
        return 1.0
    return min(1.0, (step - born + 1) / rewarm_steps)


def _ramp(done: float, begin: float, finish: float, *, start: float, end: float) -> float:
    if done >= finish:
        return end
    if done <= begin:
        return start
    return start + (end - start) * (done - begin) / (finish - begin)
