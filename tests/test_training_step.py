"""One step: what gets a gradient, what moves, and what a bad batch cannot touch."""

import dataclasses
import math

import pytest
import torch

from agssd_core.errors import TrainingError
from agssd_core.training.hiding import Hidden
from agssd_core.training.student_pass import MicroBatch, StudentRule, student_terms
from tests.support.training import (
    batch_of,
    bits,
    body_volumes,
    merged,
    one_step,
    randomness,
    small_config,
    small_learner,
)


@pytest.fixture(scope="module")
def volumes():
    return body_volumes(4)


def stepped(config, volumes, *, step=8, **changes):
    learner = small_learner(config)
    return learner, one_step(learner, config, batch_of(config, volumes), step=step, **changes)


def test_gradients_reach_everything_that_trains_and_never_the_teacher(volumes):
    """M6, M7: with the gate open the fused term trains the cross-view attention as well."""
    config = small_config()
    learner = small_learner(config)
    with torch.no_grad():
        learner.model.student.cvaa.gate.weight.fill_(0.5)
    one_step(learner, config, batch_of(config, volumes), step=9)
    without = [
        name for name, item in learner.model.student.named_parameters() if not item.grad.abs().sum()
    ]
    # Softmax ignores what all keys share, so the key half of this bias gets none.
    assert [name for name in without if "key_value.bias" not in name] == []
    assert all(item.grad is None for item in learner.model.teacher.parameters())
    assert all(not item.requires_grad for item in learner.model.teacher.parameters())


def test_teacher_moves_by_the_ema_alone(volumes):
    config = small_config(agssd={"teacher": {"ema_momentum": 0.9, "ema_momentum_end": 0.9}})
    learner = small_learner(config)
    before = {n: p.clone() for n, p in learner.model.teacher.named_parameters()}
    one_step(learner, config, batch_of(config, volumes))
    student = dict(learner.model.student.named_parameters())
    for name, item in learner.model.teacher.named_parameters():
        torch.testing.assert_close(item, 0.9 * before[name] + 0.1 * student[name])


@pytest.mark.parametrize("where", ["globals_seen", "globals_clean", "locals_seen"])
def test_a_nan_touches_neither_student_nor_teacher(volumes, where):
    config = small_config()
    learner = small_learner(config)
    one_step(learner, config, batch_of(config, volumes))
    weights = bits(learner.model.shared_weights())
    optimiser = [state["exp_avg"].clone() for state in learner.optimiser.state.values()]
    batch = batch_of(config, volumes, step=1)
    getattr(batch, where)[0, 1, 0, 12, 12, 12] = math.nan
    with pytest.raises(TrainingError, match="left as they were"):
        one_step(learner, config, batch, step=1)
    assert bits(learner.model.shared_weights()) == weights
    for state, moment in zip(learner.optimiser.state.values(), optimiser, strict=True):
        assert torch.equal(state["exp_avg"], moment)
    assert all(item.grad is None for item in learner.model.student.parameters())


def test_prototypes_stay_as_drawn_in_the_first_percent(volumes):
    config = small_config()
    learner = small_learner(config)
    drawn = learner.model.student.head_cls.prototypes.weight.clone()
    one_step(learner, config, batch_of(config, volumes), step=0, total_steps=100)
    assert torch.equal(learner.model.student.head_cls.prototypes.weight, drawn)
    one_step(learner, config, batch_of(config, volumes), step=1, total_steps=100)
    assert not torch.equal(learner.model.student.head_cls.prototypes.weight, drawn)


def test_weight_decay_spares_biases_norms_tokens_and_gates(volumes):
    config = small_config()
    learner = small_learner(config)
    named = {id(item): name for name, item in learner.model.student.named_parameters()}
    decayed, spared = ([named[id(p)] for p in g["params"]] for g in learner.optimiser.param_groups)
    assert all(name.endswith("weight") for name in decayed)
    for part in ("bias", "norm", "cls_token", "mask_token", "pos_embed", "gate", "geometry"):
        assert not any(part in name for name in decayed), part
        assert any(part in name for name in spared), part


def test_fedprox_pulls_towards_the_anchor(volumes):
    config = small_config(training={"optimiser": {"max_grad_norm": 1e6}})
    pulled, free = small_learner(config), small_learner(config)
    for learner in (pulled, free):
        learner.training = config.training.model_copy(
            update={
                "optimiser": config.training.optimiser.model_copy(update={"max_grad_norm": 1e6})
            }
        )
    pulled.anchor = [item.detach() + 1.0 for item in pulled.model.student.parameters()]
    pulled.prox_mu = 0.25
    for learner in (pulled, free):
        one_step(learner, config, batch_of(config, volumes))
    for one, other in zip(
        pulled.model.student.parameters(), free.model.student.parameters(), strict=True
    ):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad - 0.25, rtol=1e-4, atol=1e-5)


def test_accumulated_parts_equal_the_whole_batch(volumes):
    """Below 16 views nothing is standardised over the batch, so only rounding may differ."""
    found = []
    for parts in (1, 2, 4):
        config = small_config(training={"batch_size": 4, "accumulate": parts})
        found.append(stepped(config, volumes))
    (whole, first), *others = found
    for learner, result in others:
        assert set(result.terms) == set(first.terms)
        for name, value in first.terms.items():
            torch.testing.assert_close(result.terms[name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.grad_norm, first.grad_norm, rtol=1e-4, atol=1e-6)
        for one, other in zip(
            whole.model.state.buffers(), learner.model.state.buffers(), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_changes_no_bit(volumes):
    ends = []
    for on in (False, True):
        config = small_config(
            training={"activation_checkpointing": on}, agssd={"model": {"drop_path": 0.3}}
        )
        ends.append(bits(stepped(config, volumes)[0].model.shared_weights()))
    assert ends[0] == ends[1]


def test_bf16_stays_close_and_finite(volumes):
    exact, rough = (
        stepped(small_config(training={"precision": p}), volumes)[1] for p in ("fp32", "bf16")
    )
    assert rough.terms["loss"].dtype == torch.float32
    assert rough.targets.patch_probs.dtype == torch.float32
    assert float(rough.terms["loss"]) == pytest.approx(float(exact.terms["loss"]), rel=0.03)
    assert float(rough.terms["loss"]) != float(exact.terms["loss"])


def terms_with(learner, config, batch, result, change):
    """Student terms again, after ``change`` has edited targets or student inputs."""
    micro = MicroBatch(batch, result.hiding.hidden, result.targets, result.hiding.edge)
    rule = StudentRule(config.agssd, learner.resolved, 0.5, learner.group)
    return student_terms(
        learner.model.student,
        change(micro),
        rule,
        autocast=learner.autocast(torch.device("cpu")),
        generator=randomness(config).depth,
    )


def test_patch_and_reconstruction_terms_see_hidden_tokens_only(volumes):
    """M8: changing the clean voxels of visible tokens changes no term."""
    config = small_config(agssd={"cvac": {"n_local": 0}})
    learner = small_learner(config)
    batch = batch_of(config, volumes)
    result = one_step(learner, config, batch)
    hidden: Hidden = result.hiding.hidden
    assert len(hidden.index) == int(hidden.mask.sum())
    assert bool(hidden.of(hidden.mask).all())
    patch = config.agssd.model.patch_size
    side = config.agssd.cvac.global_size[0] // patch

    def repainted(which):
        def change(micro):
            voxels = which.view(2, -1, 1, side, side, side)
            for axis in (3, 4, 5):
                voxels = voxels.repeat_interleave(patch, dim=axis)
            clean = torch.where(voxels, 1 - batch.globals_clean, batch.globals_clean)
            return dataclasses.replace(micro, batch=dataclasses.replace(batch, globals_clean=clean))

        return change

    same = terms_with(learner, config, batch, result, lambda micro: micro)
    visible = terms_with(learner, config, batch, result, repainted(~hidden.mask))
    masked = terms_with(learner, config, batch, result, repainted(hidden.mask))
    assert {n: v.item() for n, v in same.items()} == {n: v.item() for n, v in visible.items()}
    assert masked["loss_rec"].item() != same["loss_rec"].item()


def test_what_the_student_says_of_visible_tokens_costs_nothing(volumes, monkeypatch):
    """M8: noise on its visible tokens changes no term, on its hidden ones both."""
    off = {
        "cvac": {"n_local": 0},
        "cvaa": {"mode": "off"},
        "model": {"decoder": "linear"},
        "head": {"input_norm_patch": "none"},
    }
    config = small_config(agssd=off)
    learner = small_learner(config)
    batch = batch_of(config, volumes)
    result = one_step(learner, config, batch)
    plain = learner.model.student.encoder.forward_features

    def terms(which):
        def noisy(crops, mask, **kwargs):
            cls, tokens = plain(crops, mask, **kwargs)
            noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
            return cls, tokens + noise * which(mask)[..., None]

        monkeypatch.setattr(learner.model.student.encoder, "forward_features", noisy)
        found = terms_with(learner, config, batch, result, lambda micro: micro)
        return found["loss_patch"].item(), found["loss_rec"].item()

    same = terms(torch.zeros_like)
    assert terms(torch.logical_not) == same
    assert all(a != b for a, b in zip(terms(torch.clone), same, strict=True))


SWITCHES = {
    "cvac off": {"cvac": {"enabled": False}},
    "no local crops": {"cvac": {"n_local": 0}},
    "flips everywhere": {"cvac": {"flip": "all"}},
    "eaam off": {"eaam": {"enabled": False}},
    "sobel": {"eaam": {"edge": "sobel"}},
    "p90": {"eaam": {"pool": "p90"}},
    "log score": {"eaam": {"score": "log"}},
    "kappa": {"eaam": {"kappa": -0.05}},
    "co mask": {"eaam": {"co_mask": 1.0}},
    "half masked": {"eaam": {"mask_prob": 0.1}},
    "cvaa off": {"cvaa": {"mode": "off"}},
    "cvaa align": {"cvaa": {"mode": "align"}, "loss": {"align": 1.0}},
    "hard geometry": {"cvaa": {"geom_bias": "hard"}},
    "no geometry": {"cvaa": {"geom_bias": "none"}},
    "keys of the student": {"cvaa": {"kv_source": "student"}},
    "dropped fusion": {"cvaa": {"p_drop": 1.0}},
    "attention supervised": {"loss": {"attn_sup": 0.5}},
    "koleo": {"loss": {"koleo": 0.1}},
    "variance": {"loss": {"variance": 0.1}},
    "no patch loss": {"loss": {"patch": 0.0}},
    "no cls loss": {"loss": {"cls": 0.0}},
    "no reconstruction": {"loss": {"rec": 0.0}},
    "norm pix": {"loss": {"norm_pix": True}},
    "edge weight": {"loss": {"edge_weight": 2.0}},
    "shared head": {"head": {"shared": True}},
    "batch statistics": {"head": {"input_norm_cls": "batch", "input_norm_patch": "batch"}},
    "no input norm": {"head": {"input_norm_cls": "none", "input_norm_patch": "none"}},
    "sinkhorn": {"target": {"cls": "sinkhorn", "patch": "sinkhorn"}},
    "centred targets": {"target": {"patch": "center"}},
    "temperature": {"target": {"teacher_temperature": 0.07, "teacher_temperature_end": 0.07}},
    "sincos": {"model": {"pos_embed": "sincos"}},
    "transformer decoder": {"model": {"decoder": "transformer"}},
    "drop": {"model": {"masking": "drop"}},
    "drop path": {"model": {"drop_path": 0.5}},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_takes_a_step_and_changes_it(volumes, switch):
    """A switch that changed nothing would be one that is not connected."""
    opened = {"cvaa": {"beta": 0.5}}
    base = small_config(agssd=opened)
    config = small_config(agssd=merged(opened, SWITCHES[switch]))

    def end(settings):
        learner = small_learner(settings)
        learner.model.state.density_mean.fill_(0.2)  # the adaptive ratio waits for a history
        learner.model.state.density_std.fill_(0.05)
        if learner.model.student.cvaa is not None:
            for network in (learner.model.student, learner.model.teacher):
                with torch.no_grad():
                    network.cvaa.gate.weight.fill_(1.0)
        result = one_step(learner, settings, batch_of(settings, volumes), step=8)
        assert all(torch.isfinite(value) for value in result.terms.values())
        return float(result.terms["loss"])

    # One volume in the batch's centre keeps a fresh centre at 0; a moved one would differ.
    if switch == "centred targets":
        assert end(config) != pytest.approx(end(base), rel=1e-6)
    else:
        assert end(config) != end(base)
