"""The monitor sees both ways to collapse, and neither in healthy targets."""

import math

import numpy as np
import pytest
import torch

from agssd_core.training.monitor import CollapseMonitor, TeacherBatch, effective_rank

K, E = 16, 12


def shown(cls_probs, patch_probs=None, *, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    views, volumes = cls_probs.shape[:2]
    return TeacherBatch(
        cls_probs=cls_probs,
        patch_probs=cls_probs.flatten(0, 1) if patch_probs is None else patch_probs,
        cls=torch.randn(views, volumes, E, generator=generator),
        tokens=spread * torch.randn(views, volumes, 27, E, generator=generator),
    )


def one_hot(volumes, *, seed):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(K, (2, volumes), generator=generator)
    return torch.nn.functional.one_hot(chosen, K).float()


def filled(make, *, steps=8, volumes=8, **settings):
    monitor = CollapseMonitor(64, 0.1, **settings)
    for step in range(steps):
        monitor.add(make(volumes, step), volumes=volumes)
    return monitor


def test_healthy_targets_pass_and_their_information_is_ln_k():
    monitor = filled(lambda volumes, step: shown(one_hot(volumes, seed=step), seed=step))
    found = monitor.metrics()
    assert monitor.collapsed() == ()
    assert found["information_cls"] == pytest.approx(math.log(K), abs=0.15)
    assert found["entropy_cls"] == 0
    assert found["monitor_volumes"] == 64


@pytest.mark.parametrize("constant", [False, True], ids=["uniform", "constant"])
def test_both_collapses_are_named(constant):
    probs = torch.zeros(2, 8, K)
    probs[..., 0] = 1.0
    if not constant:
        probs[:] = 1 / K
    monitor = filled(lambda _, step: shown(probs, seed=step))
    assert {"information_cls", "information_patch"} <= set(monitor.collapsed())
    assert ("entropy_cls_marginal" in monitor.collapsed()) == constant


def test_lost_rank_and_equal_cls_tokens_are_named():
    def decaying(volumes, step):
        batch = shown(one_hot(volumes, seed=step), seed=step)
        flat = batch.tokens[..., :1].expand_as(batch.tokens)
        same = torch.ones_like(batch.cls)
        return batch if step == 0 else TeacherBatch(batch.cls_probs, batch.patch_probs, same, flat)

    monitor = filled(decaying, steps=9)
    assert set(monitor.collapsed()) == {"effective_rank", "cls_std"}
    assert monitor.metrics()["effective_rank_share"] < 0.2


def test_no_verdict_before_the_window_is_full_and_only_on_heads_that_train():
    uniform = torch.full((2, 8, K), 1 / K)
    early = filled(lambda *_: shown(uniform), steps=7)
    assert not early.ready
    assert early.collapsed() == ()
    off = filled(lambda *_: shown(uniform), heads=())
    assert off.collapsed() == ()


def test_window_forgets_old_steps_but_never_falls_below_its_size():
    monitor = CollapseMonitor(20, 0.1)
    for step in range(9):
        monitor.add(shown(one_hot(8, seed=step)), volumes=8)
    assert monitor.metrics()["monitor_volumes"] == 24


def test_state_continues_bit_for_bit():
    def make(step):
        return shown(one_hot(8, seed=step), seed=step)

    whole, first, second = (CollapseMonitor(32, 0.1) for _ in range(3))
    for step in range(6):
        whole.add(make(step), volumes=8)
    for step in range(3):
        first.add(make(step), volumes=8)
    state = {name: np.array(array) for name, array in first.state().items()}
    second.load_state(state, device=torch.device("cpu"))
    for step in range(3, 6):
        second.add(make(step), volumes=8)
    assert second.metrics() == whole.metrics()
    second.load_state({}, device=torch.device("cpu"))
    assert second.metrics() == {}


def test_effective_rank_counts_directions():
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(500, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    assert 2 < effective_rank(few) <= 3
    assert effective_rank(torch.eye(6)) == pytest.approx(5, abs=1e-6)  # centring takes one away
    assert effective_rank(torch.ones(9, 4)) == 0
