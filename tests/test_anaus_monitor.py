"""The anatomy monitor sees collapse in each of its forms, and none in healthy projections."""

import numpy as np
import pytest
import torch

from agssd_core.training.anaus_monitor import AnatomyMonitor
from agssd_core.training.anaus_step import ScaleRows

C = 16


def rows(frames, step, *, kind="healthy", scales=2):
    """Draws of four anatomies; in ``healthy`` each has a direction of its own in every frame."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for scale in range(scales):
        ids = torch.randint(1, 5, (2, frames, 6), generator=generator)
        own = torch.randn(frames, 5, C, generator=torch.Generator().manual_seed(99 + step + scale))
        picked = own[torch.arange(frames)[None, :, None].expand_as(ids), ids]
        noise = torch.randn(picked.shape, generator=generator)
        made = {
            "healthy": picked + 0.1 * noise,
            "constant": torch.ones(picked.shape) + 0.001 * noise,
            "mixed": noise,  # spread out, but one anatomy's views are no closer than others'
            "flat": picked[..., :1] * torch.ones(C) + 0.005 * noise,
        }
        found.append(ScaleRows(made[kind], ids))
    return tuple(found)


def filled(kind, *, steps=8, frames=8, window=64):
    monitor = AnatomyMonitor(window, 0.02)
    for step in range(steps):
        monitor.add(rows(frames, step, kind="healthy" if step == 0 else kind), frames=frames)
    return monitor


def test_healthy_projections_pass():
    monitor = filled("healthy")
    found = monitor.metrics()
    assert monitor.collapsed() == ()
    assert found["same_anatomy_cosine"] > 0.9
    assert abs(found["other_anatomy_cosine"]) < 0.2
    assert found["monitor_frames"] == 64


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("constant", {"anatomy_gap", "projection_std"}),
        ("mixed", {"anatomy_gap"}),
        ("flat", {"effective_rank"}),
    ],
)
def test_every_collapse_is_named(kind, named):
    assert named <= set(filled(kind, steps=12).collapsed())


def test_no_verdict_before_the_window_is_full():
    early = filled("constant", steps=7)
    assert not early.ready
    assert early.collapsed() == ()


def test_a_draw_without_anatomy_counts_nowhere():
    shown = rows(8, 0)
    dead = tuple(ScaleRows(each.projections, each.ids.clone()) for each in shown)
    for each in dead:
        each.ids[:, :, 3:] = 0
        each.projections[:, :, 3:] = 1e3
    one, other = AnatomyMonitor(8, 0.02), AnatomyMonitor(8, 0.02)
    one.add(dead, frames=8)
    other.add(
        tuple(ScaleRows(each.projections[:, :, :3], each.ids[:, :, :3]) for each in dead), frames=8
    )
    for name in ("same_anatomy_cosine", "other_anatomy_cosine", "projection_std"):
        assert one.metrics()[name] == pytest.approx(other.metrics()[name])


def test_frames_with_one_anatomy_each_are_not_blamed_for_having_no_other():
    monitor = AnatomyMonitor(8, 0.02)
    shown = rows(8, 0)
    for each in shown:
        each.ids[:] = 1
    monitor.add(shown, frames=8)
    assert "anatomy_gap" not in monitor.collapsed()


def test_state_continues_bit_for_bit():
    whole, first, second = (AnatomyMonitor(32, 0.02) for _ in range(3))
    for step in range(6):
        whole.add(rows(8, step), frames=8)
    for step in range(3):
        first.add(rows(8, step), frames=8)
    state = {name: np.array(array) for name, array in first.state().items()}
    second.load_state(state, device=torch.device("cpu"))
    for step in range(3, 6):
        second.add(rows(8, step), frames=8)
    assert second.metrics() == whole.metrics()
    second.load_state({}, device=torch.device("cpu"))
    assert second.metrics() == {}
