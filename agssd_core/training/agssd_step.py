"""One optimiser step of AG-SSD; read this file first.

Order is the argument: hide tokens, ask the teacher, judge the student, check that everything is
finite, and only then move the student, the teacher and the running state, in this order. A NaN
reaches none of them.

Source: after Yu & Dai 2026, doi 10.1109/TMI.2026.3680920 (abstract); details as docs/method.md.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from agssd_core.config import AgssdConfig, TrainingConfig
from agssd_core.errors import TrainingError
from agssd_core.losses.centring import updated_centre
from agssd_core.models.student_teacher import StudentTeacher
from agssd_core.training.build import Resolved, set_rates
from agssd_core.training.distributed import ProcessGroup
from agssd_core.training.hiding import Hiding, hide_tokens
from agssd_core.training.mixed_precision import EncoderPrecision
from agssd_core.training.schedules import StepSchedule
from agssd_core.training.student_pass import MicroBatch, StudentRule, Terms, student_terms
from agssd_core.training.teacher_pass import TargetRule, Targets, teacher_targets
from agssd_core.views.batch import ViewBatch
from agssd_core.views.masking import updated_density


@dataclass
class Learner:
    """Everything that a step changes or is governed by.

    Attributes:
        model: student, teacher and running state.
        optimiser: of the student.
        agssd, training, resolved: settings, with every ``auto`` settled.
        group: the processes of this site.
        anchor: FedProx, the student's parameters at the start of the round; None without.
        prox_mu: FedProx, strength of the pull towards them.
    """

    model: StudentTeacher
    optimiser: torch.optim.Optimizer
    agssd: AgssdConfig
    training: TrainingConfig
    resolved: Resolved
    group: ProcessGroup = field(default_factory=ProcessGroup)
    anchor: list[Tensor] | None = None
    prox_mu: float = 0.0

    def autocast(self, device: torch.device) -> EncoderPrecision:
        """bfloat16 for encoders and cross-view attention, when configured."""
        return EncoderPrecision(device, bf16=self.training.precision == "bf16")


@dataclass(frozen=True)
class StepRandomness:
    """The two CPU generators of a step: masks are the same in all processes, depth is not."""

    masks: torch.Generator
    depth: torch.Generator


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for metrics and monitor; nothing has a gradient."""

    terms: Terms
    grad_norm: Tensor
    hiding: Hiding
    targets: Targets


def train_step(
    learner: Learner,
    batch: ViewBatch,
    schedule: StepSchedule,
    *,
    step: int,
    alpha: float,
    randomness: StepRandomness,
) -> StepResult:
    """Take one step.

    Under accumulation masks, targets, centres and running statistics are the whole batch's; only
    batch standardisation (not ``ema``, ``volume``), KoLeo and variance see a micro-batch alone.

    Args:
        learner: what is changed.
        batch: this process's views, on the model's device.
        schedule: this step's rates.
        step: global step.
        alpha: EAAM's preference for edges.
        randomness: generators seeded for this step.

    Raises:
        TrainingError: a loss or gradient is not finite; weights and state were left as they were.
    """
    model, agssd = learner.model, learner.agssd
    autocast = learner.autocast(batch.globals_seen.device)
    learner.optimiser.zero_grad(set_to_none=True)

    hiding = hide_tokens(
        batch,
        agssd,
        alpha=alpha,
        state=model.state,
        generator=randomness.masks,
        group=learner.group,
    )
    rule = TargetRule(
        agssd=agssd, resolved=learner.resolved, temperature=schedule.teacher_temperature,
        step=step, parts=learner.training.accumulate, group=learner.group
    )  # fmt: skip
    targets = teacher_targets(
        model.teacher, model.state, batch=batch, hidden=hiding.hidden, rule=rule, autocast=autocast
    )
    parts = _micro_batches(batch, hiding, targets, parts=learner.training.accumulate)
    terms = _student_backward(
        learner, parts, beta=schedule.beta, autocast=autocast, generator=randomness.depth
    )

    grad_norm = _finish_gradients(learner, frozen=schedule.prototypes_frozen)
    _require_finite(learner, terms["loss"], grad_norm)
    nn.utils.clip_grads_with_norm_(
        model.student.parameters(), learner.training.optimiser.max_grad_norm, grad_norm
    )
    set_rates(learner.optimiser, learning_rate=schedule.learning_rate, decay=schedule.weight_decay)
    learner.optimiser.step()
    model.update_teacher(ema_momentum=schedule.ema_momentum)
    _update_state(learner, hiding, targets)
    return StepResult(terms, grad_norm, hiding, targets)


def _student_backward(
    learner: Learner,
    micro_batches: list[MicroBatch],
    *,
    beta: float,
    autocast: EncoderPrecision,
    generator: torch.Generator,
) -> Terms:
    """Forward and backward of every micro-batch; returns the means of their loss terms."""
    terms: Terms = {}
    rule = StudentRule(learner.agssd, learner.resolved, beta, learner.group)
    for micro in micro_batches:
        part = student_terms(
            learner.model.student, micro, rule, autocast=autocast, generator=generator
        )
        (part["loss"] / len(micro_batches)).backward()  # type: ignore[no-untyped-call]
        for name, value in part.items():
            terms[name] = terms.get(name, 0) + value.detach() / len(micro_batches)
    return terms


def _micro_batches(
    batch: ViewBatch, hiding: Hiding, targets: Targets, *, parts: int
) -> list[MicroBatch]:
    """Cut a batch, its hidden tokens and their targets into equal parts of volumes."""
    if parts == 1:
        return [MicroBatch(batch, hiding.hidden, targets, hiding.edge)]
    length = len(batch) // parts
    views = len(batch.globals_seen)
    edge = hiding.edge.view(views, len(batch), *hiding.edge.shape[1:])
    found = []
    for number, part in enumerate(batch.split(parts)):
        start = number * length
        found.append(
            MicroBatch(
                batch=part,
                hidden=hiding.hidden.narrow(start, length),
                targets=targets.narrow(start, length, hiding.hidden),
                edge=edge[:, start : start + length].flatten(0, 1),
            )
        )
    return found


def _finish_gradients(learner: Learner, *, frozen: bool) -> Tensor:
    """Average over processes, add FedProx, freeze prototypes; returns the total norm."""
    student = learner.model.student
    learner.group.average_gradients(student.parameters())
    if learner.anchor is not None:
        for parameter, origin in zip(student.parameters(), learner.anchor, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=learner.prox_mu)
    if frozen:
        # No gradient at all, rather than one of zeros: then weight decay skips them as well.
        for parameter in student.prototype_parameters():
            parameter.grad = None
    gradients = [item.grad for item in student.parameters() if item.grad is not None]
    norm: Tensor = nn.utils.get_total_norm(gradients)
    return norm


def _require_finite(learner: Learner, loss: Tensor, grad_norm: Tensor) -> None:
    """The step's one deliberate wait for the device: nothing moves before this passes."""
    if not bool(torch.isfinite(loss) & torch.isfinite(grad_norm)):
        learner.optimiser.zero_grad(set_to_none=True)
        raise TrainingError(
            f"loss is {loss.item():g} and the gradient's norm {grad_norm.item():g}; both must be "
            "finite. Weights were left as they were. Lower training.optimiser.learning_rate or "
            "max_grad_norm, look for damaged volumes, then resume."
        )


@torch.no_grad()
def _update_state(learner: Learner, hiding: Hiding, targets: Targets) -> None:
    """Move centres and statistics, from what the teacher saw in this step."""
    state, resolved = learner.model.state, learner.resolved
    momentum, all_sum = learner.agssd.target.centre_momentum, learner.group.sum
    if resolved.target_cls == "center":
        state.centre_cls.copy_(
            updated_centre(state.centre_cls, targets.cls_logits, momentum=momentum, all_sum=all_sum)
        )
    if resolved.target_patch == "center":
        state.centre_patch.copy_(
            updated_centre(
                state.centre_patch, targets.patch_logits, momentum=momentum, all_sum=all_sum
            )
        )
    if targets.cls_moments is not None:
        state.cls_mean.copy_(targets.cls_moments.mean)
        state.cls_var.copy_(targets.cls_moments.var)
    mean, std = updated_density(
        state.density_mean,
        state.density_std,
        hiding.density,
        learner.agssd.eaam.density_momentum,
    )
    state.density_mean.copy_(mean)
    state.density_std.copy_(std)
