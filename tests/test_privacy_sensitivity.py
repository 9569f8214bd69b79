"""One patient more changes the clipped sum by C at most; what couples patients changes it by more.

The limit holds whatever images and weights are, so both are drawn at random and pushed to
extremes. Every breaker that the configuration refuses is switched on past it, to show that the
measure would see it.
"""

import dataclasses

import pytest
import torch
from torch.nn import functional

from agssd_core.losses.centring import centred_softmax, sinkhorn
from agssd_core.losses.regularisers import koleo, variance_hinge
from agssd_core.training.privacy.agssd_losses import PatientRule, patient_losses, some_patients
from tests.support.privacy import (
    RATES,
    SETTINGS,
    flat,
    generators,
    patient_batch,
    prepared,
    private_config,
    private_step,
)

TINY = {
    "model": {"width": 12, "depth": 1, "heads": 2},
    "cvac": {"global_size": [16, 16, 16], "local_size": [8, 8, 8], "n_local": 1},
    "head": {"prototypes": 8, "hidden": 8, "bottleneck": 8},
}
PATIENTS = 4


class Cases:
    """Nets and batches at random, some of them extreme."""

    def __init__(self, mode="hooks"):
        self.config = private_config(agssd=TINY, privacy={"mode": mode})
        self.step = private_step(self.config)
        self.drawn = [
            item.detach().clone() for item in self.step.learner.model.student.parameters()
        ]
        self.batch = patient_batch(self.config, PATIENTS)

    def draw(self, number, outlier=-1):
        """New weights, new images; one patient, by default the last, is often an outlier."""
        torch.manual_seed(number)
        scale = float(10 ** torch.empty(()).uniform_(-1, 1.5))
        with torch.no_grad():
            model = self.step.learner.model
            for item, start in zip(model.student.parameters(), self.drawn, strict=True):
                item.copy_(start + scale * 0.1 * torch.randn_like(item))
            model.update_teacher(ema_momentum=float(torch.rand(())))
            model.state.centre_cls.normal_(std=float(torch.rand(())))
        shape = self.batch.globals_seen.shape
        seen = torch.rand(shape, dtype=torch.float64)
        if number % 3 == 1:
            seen[:, outlier] *= 10.0 ** float(torch.empty(()).uniform_(0, 6))
        if number % 3 == 2:
            seen[:, outlier] = -seen[:, outlier - 1]
        return dataclasses.replace(self.batch, globals_seen=seen)

    def sums(self, batch, losses, counts):
        """The clipped sums of the first so many patients."""
        for count in counts:
            self.step.clipped.reset()
            losses(batch.narrow(0, count), count)
            yield flat(self.step.clipped.totals()).clone()

    def change(self, number, losses=None):
        """How far the last patient moves the sum, in units of C."""
        sums = self.sums(self.draw(number), losses or self.private, (PATIENTS - 1, PATIENTS))
        without, with_last = sums
        return float((with_last - without).norm()) / self.config.privacy.max_grad_norm

    def changes(self, number):
        """The same for each patient in turn who joins those before: one pass a case."""
        batch = self.draw(number, outlier=number % PATIENTS)
        before = 0
        for after in self.sums(batch, self.private, range(1, PATIENTS + 1)):
            yield float((after - before).norm()) / self.config.privacy.max_grad_norm
            before = after

    def private(self, batch, count):
        self.step.add(batch, SETTINGS, generators(count))


@pytest.mark.parametrize(("mode", "count"), [("hooks", 60), ("fast-gradient-clipping", 15)])
def test_one_patient_changes_the_sum_by_c_at_most(mode, count):
    cases = Cases(mode)
    changes = [cases.change(number) for number in range(count)]
    assert 0.99 < max(changes) <= 1.0  # the limit is reached, so it is what is measured


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("mode", "count"), [("hooks", 2000), ("fast-gradient-clipping", 500)])
def test_one_patient_changes_the_sum_by_c_at_most_thousands_of_times(mode, count, capsys):
    cases = Cases(mode)
    drawn = range(10_000, 10_000 + count // PATIENTS)
    changes = [change for number in drawn for change in cases.changes(number)]
    with capsys.disabled():
        print(f"\n{mode}: {len(changes)} cases, at most {max(changes):.6f} C")  # noqa: T201
    assert len(changes) == count
    assert 0.99 < max(changes) <= 1.0


def coupled(cases, change):
    """The private losses with a change past the configuration's guard."""

    def losses(batch, count):
        micro = prepared(cases.step, batch)
        student = cases.step.learner.model.student
        rule = PatientRule(cases.config.agssd, standardised=True, beta=RATES.beta)

        def each(chosen):
            return change(student, some_patients(micro, chosen), rule)

        cases.step.clipped.add(each, count)

    return losses


def global_cls(student, micro):
    return torch.stack([student.encode(crops)[0] for crops in micro.batch.globals_seen])


def with_koleo(student, micro, rule):
    cls = global_cls(student, micro)
    return patient_losses(student, micro, rule) + koleo(cls)


def with_variance(student, micro, rule):
    cls = global_cls(student, micro).flatten(0, 1)
    return patient_losses(student, micro, rule) + 10 * variance_hinge(cls)


def with_negatives(student, micro, rule):
    one, two = functional.normalize(global_cls(student, micro), dim=-1)
    own = torch.arange(len(one))
    cost = functional.cross_entropy(one @ two.T / 0.1, own, reduction="none")
    return cost + 0 * patient_losses(student, micro, rule)


def targets_changed(micro, **probs):
    return dataclasses.replace(micro, targets=dataclasses.replace(micro.targets, **probs))


def with_sinkhorn(student, micro, rule):
    logits = micro.targets.cls_logits
    probs = sinkhorn(logits.flatten(0, 1), temperature=0.04).view_as(logits)
    return patient_losses(student, targets_changed(micro, cls_probs=probs), rule)


def with_batch_centre(student, micro, rule):
    logits = micro.targets.cls_logits
    probs = centred_softmax(logits, logits.mean(dim=(0, 1)), temperature=0.04)
    return patient_losses(student, targets_changed(micro, cls_probs=probs), rule)


def with_batch_statistics(student, micro, rule):
    cls = global_cls(student, micro)
    spread = cls.std(dim=(0, 1), keepdim=True, correction=0) + 1e-3
    logits = student.head_cls(((cls - cls.mean(dim=(0, 1), keepdim=True)) / spread).transpose(0, 1))
    target = micro.targets.cls_probs.flip(0).transpose(0, 1)
    cost = -(target * logits.div(0.1).log_softmax(dim=-1)).sum(dim=(1, 2))
    return cost + 0 * patient_losses(student, micro, rule)


BREAKERS = {
    "KoLeo": with_koleo,
    "variance over the batch": with_variance,
    "in-batch negatives": with_negatives,
    "Sinkhorn": with_sinkhorn,
    "centre of the batch": with_batch_centre,
    "standardised over the batch": with_batch_statistics,
}


@pytest.mark.parametrize("name", BREAKERS)
def test_what_couples_patients_exceeds_c(name):
    cases = Cases()
    losses = coupled(cases, BREAKERS[name])
    changes = (cases.change(number, losses) for number in range(60))
    assert any(change > 1.02 for change in changes)


def test_a_patient_whose_views_are_clipped_one_by_one_exceeds_c():
    cases = Cases()

    def losses(batch, count):
        """Each view a unit of its own, as if views lay along the batch."""
        micro = prepared(cases.step, batch)
        student = cases.step.learner.model.student
        rule = PatientRule(cases.config.agssd, standardised=True, beta=RATES.beta)
        for view in (0, 1):
            target = micro.targets.cls_probs[1 - view]

            def one_view(chosen, view=view, target=target):
                cls, _ = student.encode(micro.batch.globals_seen[view])
                logits = student.head_cls(cls[:, None])[:, 0]
                return -(target * logits.div(0.01).log_softmax(dim=-1)).sum(dim=1)

            cases.step.clipped.add(
                lambda chosen: one_view(chosen) + 0 * patient_losses(student, micro, rule), count
            )

    assert max(cases.change(number, losses) for number in range(10)) > 1.5


def test_masks_drawn_across_the_batch_exceed_c():
    """One generator for all: who joins at the front changes what is hidden of everybody."""
    cases = Cases()

    def losses(batch, count):
        # The patient who is added comes first.
        turned = dataclasses.replace(
            batch,
            **{
                field.name: getattr(batch, field.name).flip(
                    0 if field.name in ("q12", "q21", "overlap", "volume_index") else 1
                )
                for field in dataclasses.fields(batch)
            },
        )
        shared = torch.Generator().manual_seed(1)
        cases.step.add(turned, SETTINGS, [shared] * count)

    assert max(cases.change(number, losses) for number in range(20)) > 1.02
