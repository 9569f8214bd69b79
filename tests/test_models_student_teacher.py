"""The pair: who owns what, the EMA, and the named arrays on the wire."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.errors import WeightsError
from agssd_core.models.student_teacher import takes_weight_decay
from agssd_core.weights import load_weights, save_weights, schema_of
from tests.support.models import randomised, tiny_model, tiny_vit


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


VARIANTS = [
    {},
    {"shared_head": True},
    {"cvaa": "off"},
    {"cvaa": "align", "decoder": "transformer"},
    {"masking": "drop", "geom_bias": "none"},
]


def parameters(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_teacher_starts_as_a_copy_without_what_only_a_student_needs(changes):
    model = tiny_model(**changes)
    student, teacher = parameters(model.student), parameters(model.teacher)
    assert all(torch.equal(value, student[name]) for name, value in teacher.items())
    surplus = {name.split(".")[0] for name in student.keys() - teacher.keys()}
    expected = {"decoder"}
    expected |= {"align"} if changes.get("cvaa") == "align" else set()
    expected |= {"predictor"} if changes.get("masking") == "drop" else set()
    assert surplus == expected
    has_fusion = any(name.startswith("cvaa") for name in student)
    assert has_fusion == (changes.get("cvaa", "fuse") == "fuse")


def test_memory_is_not_shared_between_the_pair():
    model = tiny_model()
    before = parameters(model.teacher)
    randomised(model.student)
    assert all(torch.equal(v, before[n]) for n, v in parameters(model.teacher).items())


def test_m6_the_teacher_never_gets_gradients_and_stays_in_eval():
    model = tiny_model(vit=tiny_vit(drop_path=0.4)).train()
    assert model.student.training
    assert not any(module.training for module in model.teacher.modules())
    crops = torch.rand(2, 1, 16, 16, 16)
    targets = model.teacher.head_patch(model.teacher.encode(crops)[1])
    assert not targets.requires_grad
    scores = model.student.head_patch(model.student.encode(crops)[1])
    (scores - targets).square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    model.requires_grad_(requires_grad=True).train()
    assert not any(module.training for module in model.teacher.modules())


def test_m6_momentum_one_changes_no_bit_and_zero_copies_the_student():
    model = tiny_model()
    randomised(model.student, 1)
    randomised(model.teacher, 2)
    before = parameters(model.teacher)
    model.update_teacher(ema_momentum=1.0)
    assert all(torch.equal(v, before[n]) for n, v in parameters(model.teacher).items())
    model.update_teacher(ema_momentum=0.0)
    student = parameters(model.student)
    assert all(torch.equal(v, student[n]) for n, v in parameters(model.teacher).items())


@settings(max_examples=15, deadline=None)
@given(momentum=st.floats(0, 1))
def test_m6_the_update_is_the_formula_and_leaves_the_student_alone(momentum):
    model = tiny_model()
    randomised(model.student, 1)
    randomised(model.teacher, 2)
    student, teacher = parameters(model.student), parameters(model.teacher)
    model.update_teacher(ema_momentum=momentum)
    for name, value in parameters(model.teacher).items():
        expected = momentum * teacher[name].double() + (1 - momentum) * student[name].double()
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(v, student[n]) for n, v in parameters(model.student).items())


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("include_teacher", [True, False])
def test_weights_survive_the_wire_and_the_disk(changes, include_teacher, tmp_path):
    model, empty = tiny_model(0, **changes), tiny_model(1, **changes)
    randomised(model.student, 5)
    randomised(model.teacher, 6)
    model.state.density_mean.fill_(0.25)
    weights = model.shared_weights(include_teacher=include_teacher)
    assert schema_of(weights) == model.shared_schema(include_teacher=include_teacher)
    save_weights(tmp_path / "w.safetensors", weights)
    kept = parameters(empty.teacher)
    loaded = load_weights(tmp_path / "w.safetensors")
    empty.load_shared_weights(loaded, include_teacher=include_teacher)
    back = empty.shared_weights()
    assert all(np.array_equal(back[name], array) for name, array in weights.items())
    if not include_teacher:
        assert all(torch.equal(v, kept[n]) for n, v in parameters(empty.teacher).items())


def test_the_wire_carries_each_array_once_and_nothing_useless():
    model = tiny_model(shared_head=True, vit=tiny_vit(pos_embed="sincos"))
    names = model.shared_weights()
    assert {name.split("/")[0] for name in names} == {"student", "teacher", "state"}
    for useless in ("norm_cross_attn", "classification_head", "pos_embed", "head_patch", "drop"):
        assert not any(useless in name for name in names), useless
    assert all(array.dtype == np.float32 for array in names.values())
    trained = {n for n, p in model.student.named_parameters() if p.requires_grad}
    assert {n.removeprefix("student/") for n in names if n.startswith("student/")} == trained


def test_shared_weights_are_copies():
    model = tiny_model()
    weights = model.shared_weights()
    before = {name: array.copy() for name, array in weights.items()}
    randomised(model)
    assert all(np.array_equal(weights[name], array) for name, array in before.items())
    model.load_shared_weights(weights)
    weights["state/centre_cls"] += 1
    assert (model.state.centre_cls == 0).all()


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape", "dtype", "teacher"])
def test_arrays_that_do_not_fit_are_refused_and_nothing_changes(fault):
    model = tiny_model(0)
    weights = tiny_model(1).shared_weights()
    name = "student/encoder.cls_token.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "surplus":
        weights["student/extra"] = weights[name]
    elif fault == "shape":
        weights[name] = weights[name][:, :, :1]  # torch would broadcast it
    elif fault == "dtype":
        weights[name] = weights[name].astype(np.float64)
    else:
        weights = {n: a for n, a in weights.items() if not n.startswith("teacher/")}
    before = model.shared_weights()
    with pytest.raises(WeightsError, match="Use the same model configuration and version"):
        model.load_shared_weights(weights)
    assert all(np.array_equal(a, before[n]) for n, a in model.shared_weights().items())


def test_an_optimiser_keeps_its_parameters_when_weights_are_loaded():
    model = tiny_model()
    before = [p.data_ptr() for p in model.parameters()]
    model.load_shared_weights(tiny_model(1).shared_weights())
    assert [p.data_ptr() for p in model.parameters()] == before


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_parameters_live_in_leaf_modules(changes):
    """Per-sample gradient rules attach to leaves; a bare parameter beside children has none."""
    model = tiny_model(**changes)
    owners = [m for m in model.student.modules() if m._parameters]
    assert owners
    assert [type(m).__name__ for m in owners if list(m.children())] == []


def test_per_sample_gradients_of_the_student_match_a_loop():
    """Every layer is a function of its own sample, so torch.func can vectorise over samples."""
    model = tiny_model(vit=tiny_vit(depth=1, plain_attention=True)).student.double()
    randomised(model)
    crops = torch.rand(3, 1, 16, 16, 16, dtype=torch.float64)
    mask = torch.rand(3, 64) < 0.5
    weights = {n: p.detach() for n, p in model.encoder.named_parameters()}

    def loss(weights, crop, hidden):
        arguments = (crop[None], hidden[None])
        cls, tokens = torch.func.functional_call(model.encoder, weights, arguments)
        return cls.square().sum() + tokens.sin().sum()

    model.encoder.forward = model.encoder.forward_features
    together = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, crops, mask)
    for sample in range(3):
        alone = torch.func.grad(loss)(weights, crops[sample], mask[sample])
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name][sample], gradient, atol=1e-9, rtol=1e-9)


def test_weight_decay_spares_biases_norms_tokens_and_gates():
    model = tiny_model(decoder="transformer")
    decayed = {n for n, p in model.student.named_parameters() if takes_weight_decay(n, p)}
    assert "encoder.blocks.0.attn.qkv.weight" in decayed
    assert "encoder.patch_embed.weight" in decayed
    spared = ("bias", "norm", "mask_token", "cls_token", "pos_embed", "gate", "geometry")
    assert [n for n in decayed if any(part in n for part in spared)] == []


def test_prototypes_are_named_once_each():
    assert len(tiny_model().student.prototype_parameters()) == 2
    (shared,) = tiny_model(shared_head=True).student.prototype_parameters()
    assert shared.shape == (16, 12)
