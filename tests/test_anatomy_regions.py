"""Anatomy pyramids and draws against the plainest form: 256 one-hot maps, pooled, argmax."""

import pytest
import torch
from torch.nn import functional

from agssd_core.errors import ShapeError
from agssd_core.views.regions import (
    NO_ID,
    pooling_weights,
    present_ids,
    region_pyramid,
    sample_regions,
)

SCALES = (7, 14, 28, 56)


def blocky_labels(frames=3, side=224, *, ids=(0, 1, 7, 30, 255), block=5, seed=0):
    """Maps of small blocks, so that many cells hold several ids and some hold a tie."""
    generator = torch.Generator().manual_seed(seed)
    cells = -(-side // block)
    choice = torch.randint(len(ids), (frames, cells, cells), generator=generator)
    coarse = torch.tensor(ids, dtype=torch.uint8)[choice]
    full = coarse.repeat_interleave(block, 1).repeat_interleave(block, 2)
    return full[:, :side, :side].contiguous()


def plain_owner(labels, scale):
    """(N, S, S) ids by the released code's form."""
    every = torch.arange(256)[None, :, None, None] == labels[:, None].long()
    return functional.adaptive_avg_pool2d(every.double(), scale).argmax(dim=1)


@pytest.mark.parametrize("block", [3, 4, 5, 32])
def test_the_pyramid_equals_256_one_hot_maps_cell_by_cell(block):
    labels = blocky_labels(block=block)
    ids = present_ids(labels)
    for scale, found in zip(SCALES, region_pyramid(labels, ids, SCALES), strict=True):
        owner_id = ids.gather(1, found.owner.flatten(1)).view_as(found.owner)
        assert torch.equal(owner_id, plain_owner(labels, scale))
        for frame in range(len(labels)):
            counts = torch.bincount(found.owner[frame].flatten(), minlength=ids.shape[1])
            assert torch.equal(counts.float(), found.cells[frame])


def test_frames_with_fewer_ids_are_padded_and_padding_owns_nothing():
    labels = blocky_labels()
    labels[1] = 7
    ids = present_ids(labels)
    assert ids[1].tolist() == [7, *[NO_ID] * (ids.shape[1] - 1)]
    (scale,) = region_pyramid(labels, ids, (7,))
    assert scale.cells[1].tolist() == [49.0, *[0.0] * (ids.shape[1] - 1)]


def test_a_small_anatomy_vanishes_at_the_coarse_scale_and_is_not_drawn_there():
    labels = torch.ones(1, 224, 224, dtype=torch.uint8)
    labels[0, :6, :6] = 9
    coarse, fine = region_pyramid(labels, present_ids(labels), (7, 56))
    assert coarse.cells.tolist() == [[49.0, 0.0]]
    assert fine.cells[0, 1] > 0
    generator = torch.Generator().manual_seed(0)
    drawn = sample_regions(coarse, 500, sampling="uniform", generator=generator)
    assert set(drawn.ids.flatten().tolist()) == {1}


@pytest.mark.parametrize("sampling", ["coverage", "uniform"])
def test_draws_follow_coverage_or_are_even_and_never_name_the_background(sampling):
    labels = torch.zeros(2, 56, 56, dtype=torch.uint8)
    labels[0, :, :28], labels[0, :14, 28:] = 4, 5  # half, an eighth, background the rest
    (scale,) = region_pyramid(labels, present_ids(labels), (56,))
    generator = torch.Generator().manual_seed(1)
    drawn = sample_regions(scale, 20000, sampling=sampling, generator=generator)
    share = (drawn.ids[0] == 4).double().mean().item()
    assert set(drawn.ids[0].tolist()) == {4, 5}
    assert share == pytest.approx(0.8 if sampling == "coverage" else 0.5, abs=0.02)
    assert torch.equal(scale.ids[0].gather(0, drawn.rows[0]), drawn.ids[0])
    assert drawn.ids[1].eq(0).all()  # the second frame holds no anatomy at all


def test_draws_depend_on_the_generator_alone():
    labels = blocky_labels()
    (scale,) = region_pyramid(labels, present_ids(labels), (14,))
    draw = [
        sample_regions(
            scale, 16, sampling="coverage", generator=torch.Generator().manual_seed(s)
        ).ids
        for s in (3, 3, 4)
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_pooling_weights_take_the_mean_over_an_anatomys_cells():
    labels = blocky_labels(block=32)
    ids = present_ids(labels)
    (scale,) = region_pyramid(labels, ids, (14,))
    features = torch.randn(3, 6, 14, 14, generator=torch.Generator().manual_seed(2)).double()
    pooled = pooling_weights(scale, torch.float64) @ features.flatten(2).transpose(1, 2)
    for frame in range(3):
        for row, cells in enumerate(scale.cells[frame].tolist()):
            chosen = features[frame][:, scale.owner[frame] == row]
            expected = chosen.mean(dim=1) if cells else torch.zeros(6).double()
            torch.testing.assert_close(pooled[frame, row], expected)


def test_maps_that_do_not_divide_are_refused():
    labels = torch.zeros(1, 60, 60, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="do not divide each other and a map of 60 pixels"):
        region_pyramid(labels, present_ids(labels), (7, 14))
    with pytest.raises(ShapeError, match="Take the ids from the same square maps"):
        region_pyramid(labels[:, :30], present_ids(labels), (15,))
