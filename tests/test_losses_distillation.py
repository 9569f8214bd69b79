"""Distillation terms against plain loops, and the laws they state."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.errors import ShapeError
from agssd_core.losses.distillation import (
    cls_distillation_loss,
    fused_with_fallback,
    patch_cost,
    patch_distillation_loss,
)
from agssd_core.losses.rows import row_means


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


SEEDS = st.integers(0, 2**20)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def probs(*shape, seed=0):
    drawn = torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
    return (drawn * 3).softmax(-1)


def scores_of(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64) * 2 - 1


def cross_entropy(target, scores, temperature):
    """-sum_k q_k log softmax(s / tau)_k, in float64 and element by element."""
    scaled = [float(s) / temperature for s in scores]
    peak = max(scaled)
    log_total = peak + math.log(sum(math.exp(s - peak) for s in scaled))
    return -sum(float(q) * (s - log_total) for q, s in zip(target, scaled, strict=True))


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, locals_=st.integers(0, 3), temperature=st.floats(0.05, 1))
def test_cls_loss_is_the_published_double_loop(seed, locals_, temperature):
    student = scores_of(2 + locals_, 3, 8, seed=seed)
    teacher = probs(2, 3, 8, seed=seed + 1)
    costs = [
        cross_entropy(teacher[t, b], student[v, b], temperature)
        for t in range(2)
        for v in range(2 + locals_)
        if t != v
        for b in range(3)
    ]
    found = cls_distillation_loss(student, teacher, temperature=temperature)
    assert float(found) == pytest.approx(sum(costs) / len(costs), rel=1e-9)


def test_m8_cls_pairs_exclude_the_same_view():
    student, teacher = scores_of(2, 3, 8).requires_grad_(), probs(2, 3, 8)
    teacher[1] = 0  # only teacher view 0 is left; its own student view must not be pulled
    cls_distillation_loss(student, teacher, temperature=0.1).backward()
    assert (student.grad[0] == 0).all()
    assert student.grad[1].abs().sum() > 0


def test_an_ignorant_student_costs_log_k():
    for views in (2, 6):
        student = torch.full((views, 3, 64), 0.3, dtype=torch.float64)
        found = cls_distillation_loss(student, probs(2, 3, 64), temperature=0.1)
        assert float(found) == pytest.approx(math.log(64), rel=1e-9)
    cost = patch_cost(torch.zeros(5, 64, dtype=torch.float64), probs(5, 64), temperature=0.1)
    assert cost.tolist() == pytest.approx([math.log(64)] * 5, rel=1e-9)


def test_the_cost_is_least_where_the_student_says_what_the_teacher_says():
    target = probs(4, 16)
    agreeing = patch_cost(target.log() * 0.1, target, temperature=0.1)
    entropy = -(target * target.log()).sum(-1)
    torch.testing.assert_close(agreeing, entropy, atol=1e-9, rtol=1e-9)
    other = patch_cost(scores_of(4, 16), target, temperature=0.1)
    assert (other > agreeing).all()


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, temperature=st.floats(0.05, 1))
def test_patch_cost_is_the_loop_and_has_the_textbook_gradient(seed, temperature):
    scores = scores_of(6, 8, seed=seed).requires_grad_()
    target = probs(6, 8, seed=seed + 1)
    found = patch_cost(scores, target, temperature=temperature)
    expected = [cross_entropy(target[i], scores[i].detach(), temperature) for i in range(6)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    found.sum().backward()
    textbook = ((scores / temperature).softmax(-1) - target) / temperature
    torch.testing.assert_close(scores.grad, textbook, atol=1e-9, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5))
def test_means_are_per_crop_first_then_over_crops(data, rows):
    row = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20)))
    values = torch.randn(len(row), dtype=torch.float64, generator=generator(len(row)))
    weights = torch.rand(len(row), dtype=torch.float64, generator=generator(1)) + 0.1
    for given_weights in (None, weights):
        w = torch.ones_like(values) if given_weights is None else given_weights
        crops = []
        for number in range(rows):
            mine = [i for i in range(len(row)) if row[i] == number]
            if mine:
                total = sum(float(values[i] * w[i]) for i in mine)
                crops.append(total / sum(float(w[i]) for i in mine))
        found = row_means(values, row, rows=rows, weights=given_weights)
        assert float(found.mean()) == pytest.approx(sum(crops) / len(crops), rel=1e-9, abs=1e-12)
        assert int(found.present.sum()) == len(crops)


def test_a_crop_with_many_masked_tokens_weighs_no_more_than_one_with_few():
    values, row = torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([0, 0, 0, 1])
    assert float(row_means(values, row, rows=2).mean()) == 3.0


def test_nothing_masked_gives_zero_with_a_gradient_of_zero():
    logits = torch.zeros(0, 8, requires_grad=True)
    cost = patch_cost(logits, torch.zeros(0, 8), temperature=0.1)
    loss = row_means(cost, torch.zeros(0, dtype=torch.long), rows=3).mean()
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, 8)


def means(values, row, rows=3):
    return row_means(torch.tensor(values), torch.tensor(row, dtype=torch.long), rows=rows)


def test_a_crop_without_a_fused_term_takes_its_plain_one():
    plain = means([1.0, 2.0, 4.0], [0, 1, 2])
    fused = means([10.0, 20.0], [0, 1])
    assert fused_with_fallback(plain, fused).means.tolist() == [10, 20, 4]
    assert float(fused_with_fallback(plain, fused).mean()) == pytest.approx(34 / 3)
    few_inner = torch.tensor([True, False, True])
    assert fused_with_fallback(plain, fused, few_inner).means.tolist() == [10, 2, 4]
    unmasked = means([1.0, 2.0], [0, 1])
    assert fused_with_fallback(unmasked, fused).present.tolist() == [True, True, False]


def test_beta_blends_and_without_fusion_there_is_only_the_plain_term():
    plain, fused = means([1.0, 2.0, 3.0], [0, 1, 2]), means([3.0, 4.0, 5.0], [0, 1, 2])
    assert float(patch_distillation_loss(plain)) == 2
    assert float(patch_distillation_loss(plain, fused, beta=0.0)) == 2
    assert float(patch_distillation_loss(plain, fused, beta=0.25)) == pytest.approx(2.5)


def test_at_beta_zero_the_fused_term_still_has_a_gradient():
    scores = scores_of(3, 8).requires_grad_()
    fused = row_means(patch_cost(scores, probs(3, 8), temperature=0.1), torch.arange(3), rows=3)
    patch_distillation_loss(means([1.0, 2.0, 3.0], [0, 1, 2]), fused, beta=0.0).backward()
    assert scores.grad is not None
    assert (scores.grad == 0).all()


@pytest.mark.parametrize(
    ("student", "teacher", "match"),
    [
        ((3, 2, 8), (2, 4, 8), "same batch and head size"),
        ((3, 2, 8), (2, 2, 9), "same batch and head size"),
        ((1, 2, 8), (1, 2, 8), "at least two student views"),
        ((2, 2, 8), (3, 2, 8), "at least two student views"),
    ],
    ids=str,
)
def test_cls_views_that_do_not_match_are_refused(student, teacher, match):
    with pytest.raises(ShapeError, match=match):
        cls_distillation_loss(torch.zeros(student), torch.zeros(teacher), temperature=0.1)


def test_patch_tokens_that_do_not_match_are_refused():
    with pytest.raises(ShapeError, match="same token index"):
        patch_cost(torch.zeros(1, 8), torch.zeros(3, 8), temperature=0.1)
    with pytest.raises(ShapeError, match="same token index"):
        row_means(torch.zeros(3), torch.zeros(2, dtype=torch.long), rows=1)


def test_autocast_rounds_nothing():
    scores, target = scores_of(4, 32).bfloat16(), probs(4, 32).float()
    for cost in (
        lambda: patch_cost(scores, target, temperature=0.1),
        lambda: cls_distillation_loss(scores[:, None], target[:2, None], temperature=0.1),
    ):
        expected = cost()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = cost()
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
