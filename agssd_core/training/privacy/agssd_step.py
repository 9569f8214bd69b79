"""One private step of AG-SSD: what of ``agssd_step`` changes when patients are protected.

Order is the argument: clip every patient's gradient, sum, noise, divide by a constant; only
then pull, decay, the optimiser and the teacher, which see nothing but the noised result. No
other number of a patient's stays: edge densities and batch statistics are not updated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agssd_core.config import AgssdConfig, PrivacyConfig
from agssd_core.models.student_teacher import AgssdNetwork, ModelState
from agssd_core.noise import NoiseStream
from agssd_core.training.agssd_step import Learner
from agssd_core.training.build import Resolved, set_rates
from agssd_core.training.distributed import ProcessGroup
from agssd_core.training.hiding import Hidden, flat_hidden, hide_tokens
from agssd_core.training.privacy.agssd_losses import (
    PatientRule,
    only_finite,
    patient_losses,
    some_patients,
)
from agssd_core.training.privacy.gradients import ClippedSum
from agssd_core.training.privacy.mechanism import (
    NoisedCentre,
    add_pull,
    set_private_gradients,
)
from agssd_core.training.schedules import StepSchedule
from agssd_core.training.student_pass import MicroBatch
from agssd_core.training.teacher_pass import TargetRule, teacher_targets
from agssd_core.views.batch import ViewBatch


@dataclass(frozen=True)
class StepSettings:
    """What holds for all chunks of a step; ``alpha`` is EAAM's preference for edges."""

    schedule: StepSchedule
    step: int
    alpha: float


class PrivateStep:
    """The private part of a learner: its clipped sum and its noised centre.

    Args:
        learner: what trains; parts of the student that no term reaches are frozen.
        privacy: clipping, noise, expected batch.
    """

    def __init__(self, learner: Learner, privacy: PrivacyConfig) -> None:
        freeze_unused(learner.model.student, learner.agssd)
        self.learner, self.privacy = learner, privacy
        self.clipped = ClippedSum(
            learner.model.student, max_grad_norm=privacy.max_grad_norm, mode=privacy.mode
        )
        self.centre = (
            NoisedCentre(privacy, learner.model.state.centre_cls) if has_centre(learner) else None
        )

    def add(
        self,
        batch: ViewBatch,
        settings: StepSettings,
        generators: Sequence[torch.Generator],
    ) -> None:
        """Take some patients of a step in.

        Args:
            batch: one volume a patient, on the model's device.
            settings: of the step.
            generators: one a patient, on the CPU, for its hidden tokens.
        """
        micro = self.prepared(batch, settings, generators)
        rule = patient_rule(self.learner, settings)
        student = self.learner.model.student
        self.clipped.add(
            lambda chosen: patient_losses(student, some_patients(micro, chosen), rule), len(batch)
        )
        if self.centre is not None:
            self.centre.add(micro.targets.cls_logits.mean(dim=0))

    def prepared(
        self,
        batch: ViewBatch,
        settings: StepSettings,
        generators: Sequence[torch.Generator],
    ) -> MicroBatch:
        """Hidden tokens and targets of some patients, none of which depends on another."""
        learner = self.learner
        batch = only_finite(batch)
        hidden, edge = hide_each(
            batch, learner.agssd, learner.model.state, alpha=settings.alpha, generators=generators
        )
        rule = TargetRule(
            agssd=learner.agssd,
            resolved=learner.resolved,
            temperature=settings.schedule.teacher_temperature,
            step=settings.step,
            parts=1,
            group=ProcessGroup(),
        )
        targets = teacher_targets(
            learner.model.teacher,
            learner.model.state,
            batch=batch,
            hidden=hidden,
            rule=rule,
            autocast=learner.autocast(batch.globals_seen.device),
        )
        return MicroBatch(batch, hidden, targets, edge)

    def finish(self, settings: StepSettings, stream: NoiseStream) -> None:
        """Noise the sum, also that of nobody, and move student, teacher and centre."""
        learner, schedule = self.learner, settings.schedule
        set_private_gradients(self.clipped.parameters, self.clipped.totals(), self.privacy, stream)
        student = learner.model.student
        add_pull(list(student.parameters()), learner.anchor, learner.prox_mu)
        if schedule.prototypes_frozen:
            for parameter in student.prototype_parameters():
                parameter.grad = None
        set_rates(
            learner.optimiser, learning_rate=schedule.learning_rate, decay=schedule.weight_decay
        )
        learner.optimiser.step()
        learner.model.update_teacher(ema_momentum=schedule.ema_momentum)
        if self.centre is not None:
            self.centre.move(
                learner.model.state.centre_cls,
                momentum=learner.agssd.target.centre_momentum,
                stream=stream,
            )
        self.clipped.reset()


def patient_rule(learner: Learner, settings: StepSettings) -> PatientRule:
    """How a learner's student is judged at a step."""
    standardised = learner.resolved.input_norm_patch == "volume"
    return PatientRule(learner.agssd, standardised, settings.schedule.beta)


def has_centre(learner: Learner) -> bool:
    """Whether the cls term is trained against a noised centre."""
    return learner.resolved.target_cls == "center" and learner.agssd.loss.cls > 0


def resolve_private(agssd: AgssdConfig) -> Resolved:
    """Settle every ``auto`` so that nothing of a patient meets another.

    Patches are standardised and centred over a volume's own tokens; cls tokens, which the
    encoder's last LayerNorm has already standardised, are centred by the noised centre.
    """
    head, target = agssd.head, agssd.target
    return Resolved(
        input_norm_cls="none",
        input_norm_patch="none" if head.input_norm_patch == "none" else "volume",
        target_cls="none" if target.cls == "none" else "center",
        target_patch="none" if target.patch == "none" else "volume",
    )


def freeze_unused(student: AgssdNetwork, agssd: AgssdConfig) -> None:
    """Noise would only shake what no term trains."""
    loss = agssd.loss
    unused = {
        student.head_cls: loss.cls == 0,
        student.head_patch: loss.patch == 0,
        student.cvaa: loss.patch == 0,
        student.decoder: loss.rec == 0,
    }
    for module, idle in unused.items():
        if idle and module is not None:
            module.requires_grad_(requires_grad=False)


def hide_each(
    batch: ViewBatch,
    agssd: AgssdConfig,
    state: ModelState,
    *,
    alpha: float,
    generators: Sequence[torch.Generator],
) -> tuple[Hidden, Tensor]:
    """Hide tokens of every patient with a generator of its own.

    Returns:
        Hidden tokens, and edge maps (T * B, 1, D, H, W).
    """
    each = [
        hide_tokens(
            batch.narrow(place, 1),
            agssd,
            alpha=alpha,
            state=state,
            generator=generator,
            group=ProcessGroup(),
        )
        for place, generator in enumerate(generators)
    ]
    parts = [hiding.hidden for hiding in each]
    hidden = flat_hidden(
        torch.cat([part.mask for part in parts], dim=1),
        torch.cat([part.fuse_at for part in parts], dim=1),
        torch.cat([part.fusible for part in parts], dim=1),
    )
    edge = torch.stack([hiding.edge for hiding in each], dim=1).flatten(0, 1)
    return hidden, edge
