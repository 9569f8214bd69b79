"""Boxes, the pair sampler and token maps: properties G1 to G5 of the method."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.config import CvacConfig
from agssd_core.errors import ShapeError
from agssd_core.views.crops import draw_boxes, foreground_share
from agssd_core.views.geometry import (
    ViewBox,
    affine_box,
    box_affine,
    centre_in,
    containment,
    inner,
    key_tokens,
    overlap_fraction,
    overlap_region,
    sample_tokens,
    token_centres,
    token_map,
)
from agssd_core.views.reading import cut_view, valid_tokens, view_region
from agssd_core.views.seeds import rng_for, torch_generator_for
from tests.support.volumes import memory_info

CVAC = CvacConfig(global_size=(48, 48, 48), local_size=(24, 24, 24), flip="all")
BOXES = st.builds(
    ViewBox,
    st.tuples(*[st.floats(-50, 50)] * 3),
    st.tuples(*[st.floats(1, 80)] * 3),
    st.tuples(*[st.booleans()] * 3),
)


def _extents(rng, low=24):
    """A volume whose body box has edges from ``low`` to 160 and stands somewhere inside."""
    size = tuple(int(n) for n in rng.integers(low, 160, 3))
    start = tuple(int(n) for n in rng.integers(0, 20, 3))
    shape = tuple(s + e + 5 for s, e in zip(start, size, strict=True))
    return memory_info(shape, start=start, size=size, body=np.ones((4, 4, 4), bool))


def test_g1_overlap_never_falls_below_its_bound_and_boxes_stay_in_the_body():
    rng, overlaps = np.random.default_rng(0), []
    cvac = CVAC.model_copy(update={"candidates": 1, "n_local": 0})
    for _ in range(10_000):
        info = _extents(rng)
        pair = draw_boxes(info, cvac, rng).globals_
        overlaps.append(overlap_fraction(*pair))
        for box in pair:
            low = np.asarray(info.foreground_start) - 1e-9
            high = low + info.foreground_size + 2e-9
            assert (np.asarray(box.start) >= low).all()
            assert (np.asarray(box.stop) <= high).all()
    assert min(overlaps) >= cvac.rho[0] - 1e-6
    assert np.median(overlaps) < 0.75, "the bound is met by overlapping too much"


def test_overlap_is_the_drawn_rho_where_the_body_is_large():
    rng, info = np.random.default_rng(0), memory_info((400, 400, 400), body=np.ones((4, 4, 4)))
    cvac = CVAC.model_copy(update={"rho": (0.5, 0.5), "candidates": 1})
    for _ in range(100):
        assert overlap_fraction(*draw_boxes(info, cvac, rng).globals_) == pytest.approx(0.5)


def test_g5_locals_lie_in_the_overlap_by_the_wanted_share():
    rng = np.random.default_rng(0)
    for n in range(2000):
        cvac = CVAC.model_copy(
            update={"containment": (0.5, 0.9, 1.0)[n % 3], "rho": (0.05, 0.8), "candidates": 1}
        )
        boxes = draw_boxes(_extents(rng), cvac, rng)
        shared = overlap_region(*boxes.globals_)
        for local in boxes.locals_:
            assert containment(local, shared) >= cvac.containment - 1e-9


def test_boxes_drawn_without_cvac_are_independent():
    rng, info = np.random.default_rng(0), memory_info((200, 200, 200))
    cvac = CVAC.model_copy(update={"enabled": False})
    pairs = [draw_boxes(info, cvac, rng).globals_ for _ in range(400)]
    assert min(overlap_fraction(*pair) for pair in pairs) == 0.0
    first, second = (np.array([pair[v].start[0] for pair in pairs]) for v in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15
    with_cvac = [draw_boxes(info, CVAC, rng).globals_ for _ in range(400)]
    first, second = (np.array([pair[v].start[0] for pair in with_cvac]) for v in (0, 1))
    assert np.corrcoef(first, second)[0, 1] > 0.8, "the control does not see dependence"


def test_the_shared_part_is_drawn_where_the_body_is():
    body = np.zeros((160, 160, 160), bool)
    body[:60, :60, :60] = True
    info, rng = memory_info(body.shape, body=body), np.random.default_rng(0)
    share = {}
    for candidates in (1, 8):
        cvac = CVAC.model_copy(update={"candidates": candidates})
        pairs = [draw_boxes(info, cvac, rng).globals_ for _ in range(200)]
        share[candidates] = np.mean([foreground_share(info, overlap_region(*p)) for p in pairs])
    assert share[8] > 2 * share[1]


def test_foreground_share_counts_the_cells_of_a_box():
    body = np.zeros((40, 40, 40), bool)
    body[:20] = True
    info = memory_info(body.shape, body=body)
    assert foreground_share(info, ViewBox((12, 4, 8), (16, 8, 8))) == 0.5
    assert foreground_share(info, ViewBox((20, 0, 0), (20, 40, 40))) == 0.0


def test_only_left_right_is_flipped_by_default():
    rng, info = np.random.default_rng(0), memory_info((100, 100, 100))
    boxes = [box for _ in range(100) for box in draw_boxes(info, CvacConfig(), rng).globals_]
    assert {box.flip for box in boxes} == {(True, False, False), (False, False, False)}
    assert 60 < sum(box.flip[0] for box in boxes) < 140


@given(BOXES, BOXES)
def test_g3_maps_there_and_back_are_the_identity(a, b):
    there, back = (np.linalg.inv(box_affine(y)) @ box_affine(x) for x, y in ((a, b), (b, a)))
    np.testing.assert_allclose(there @ back, np.eye(4), atol=1e-9)
    assert overlap_fraction(a, b) == pytest.approx(overlap_fraction(b, a))


@given(BOXES)
def test_a_box_comes_back_from_its_affine(box):
    again = affine_box(box_affine(box))
    np.testing.assert_allclose(again.start, box.start, atol=1e-9)
    np.testing.assert_allclose(again.size, box.size, atol=1e-9)
    assert again.flip == box.flip


def test_g3_reversing_a_view_and_its_record_changes_no_sampled_token():
    grid, rng = (4, 5, 6), np.random.default_rng(0)
    a, b = ViewBox((3, 4, 5), (20, 20, 24)), ViewBox((6, 2, 4), (18, 25, 24))
    tokens = torch.from_numpy(rng.standard_normal((1, 120, 3)))
    for flip in ((True, False, False), (False, True, True)):
        turned = ViewBox(b.start, b.size, flip)
        axes = [1 + axis for axis in range(3) if flip[axis]]
        reversed_ = tokens.view(1, *grid, 3).flip(axes).reshape(1, 120, 3)
        plain, other = (
            sample_tokens(
                field, torch.from_numpy(token_map(box_affine(a), box_affine(box), grid))[None], grid
            )
            for field, box in ((tokens, b), (reversed_, turned))
        )
        torch.testing.assert_close(plain, other, atol=1e-5, rtol=0)


def test_g4_a_view_mapped_onto_itself_keeps_every_token():
    grid, box = (4, 6, 3), ViewBox((3.5, 1, 2), (24, 30, 20), (True, False, False))
    coords = token_map(box_affine(box), box_affine(box), grid)
    np.testing.assert_allclose(coords, token_centres(grid), atol=1e-12)
    assert inner(coords, grid).all()
    tokens = torch.randn(2, 72, 5, generator=torch_generator_for(0))
    points = torch.from_numpy(coords).expand(2, -1, -1)
    torch.testing.assert_close(sample_tokens(tokens, points, grid), tokens, atol=1e-6, rtol=0)


def _coordinate_error(rng):
    """Distance between each token's voxel and what the other view says of it, and its flags."""
    shape, out, grid = (64, 64, 64), (24, 24, 24), (4, 4, 4)
    ramp = np.stack(np.meshgrid(*(np.arange(64.0) + 0.5,) * 3, indexing="ij")).astype(np.float32)
    size_a, size_b = rng.uniform(20, 30, (2, 3))
    start_a = rng.uniform(1, 63 - size_a)
    start_b = np.clip(start_a + rng.uniform(-8, 8, 3), 1, 63 - size_b)
    boxes = [
        ViewBox(tuple(start), tuple(size), tuple(bool(f) for f in rng.integers(0, 2, 3)))
        for start, size in ((start_a, size_a), (start_b, size_b))
    ]
    pooled = []
    for box in boxes:
        crops = [cut_view(axis, (0, 0, 0), box=box, out_size=out, shape=shape) for axis in ramp]
        pooled.append(F.avg_pool3d(torch.stack(crops)[None], 6).flatten(2).transpose(1, 2))
    coords = token_map(box_affine(boxes[0]), box_affine(boxes[1]), grid)
    seen = sample_tokens(pooled[1], torch.from_numpy(coords)[None], grid)
    error = (seen - pooled[0])[0].abs().amax(-1).numpy()
    return error, inner(coords, grid), centre_in(coords)


def test_g2_inner_tokens_name_the_same_voxel_and_g2b_centre_in_may_not():
    rng, worst_border = np.random.default_rng(0), 0.0
    for _ in range(60):
        error, is_inner, is_in = _coordinate_error(rng)
        assert error[is_inner].max(initial=0) < 1e-3
        worst_border = max(worst_border, error[is_in & ~is_inner].max(initial=0))
    assert worst_border > 1.0, "then inner would not be needed"


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_cutting_a_box_equals_grid_sample_on_the_whole_volume(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(5, 30, 3))
    out = tuple(int(n) for n in rng.integers(2, 20, 3))
    start, size = rng.uniform(-6, 20, 3), rng.uniform(2, 30, 3)
    box = ViewBox(tuple(start), tuple(size), tuple(bool(f) for f in rng.integers(0, 2, 3)))
    volume = rng.random(shape, dtype=np.float32)
    affine, limits = box_affine(box), np.asarray(shape)
    points = (token_centres(out) @ affine[:3, :3].T + affine[:3, 3]) / limits * 2 - 1
    expected = F.grid_sample(
        torch.from_numpy(volume)[None, None].double(),
        torch.from_numpy(points).flip(-1).view(1, *out, 3),
        align_corners=False,
        padding_mode="border",
    )[0, 0].float()
    low, extent = view_region(box, out, shape)
    part = volume[tuple(slice(s, s + e) for s, e in zip(low, extent, strict=True))]
    assert part.shape == extent, "the region leaves the volume"
    cut = cut_view(part, low, box=box, out_size=out, shape=shape)
    torch.testing.assert_close(cut, expected, atol=1e-5, rtol=0)


def test_keys_are_the_tokens_in_the_overlap_and_one_token_around_it():
    a = ViewBox((0, 0, 0), (16, 16, 16))
    b = ViewBox((8, 0, 0), (16, 16, 16), (True, False, False))
    shared = overlap_region(a, b)
    keys = key_tokens(box_affine(a), shared, (4, 4, 4)).reshape(4, 16).all(1)
    assert keys.tolist() == [False, True, True, True]
    keys = key_tokens(box_affine(b), shared, (4, 4, 4)).reshape(4, 16).all(1)
    assert keys.tolist() == [False, True, True, True]
    assert not key_tokens(box_affine(a), None, (4, 4, 4)).any()


def test_a_thin_body_is_stretched_first_and_padded_only_below_half_a_crop():
    rng = np.random.default_rng(0)
    for edge, padded in ((24, False), (23, True), (5, True), (1, True)):
        info = memory_info((100, edge, 100))
        box = draw_boxes(info, CVAC, rng).globals_[0]
        assert box.size[1] == max(edge, 24)
        outside = box.start[1] < 0 and box.stop[1] > edge
        assert outside == padded
        assert valid_tokens(box, (6, 6, 6), info.shape).any()
    valid = valid_tokens(ViewBox((0, -6, 0), (48, 24, 48)), (6, 6, 6), (100, 12, 100))
    rows = valid.reshape(6, 6, 6)[0, :, 0]
    assert rows.tolist() == [False, True, True, True, True, False]


def test_a_thin_body_in_a_thick_volume_takes_real_voxels_instead_of_padding():
    info, rng = memory_info((100, 100, 100), start=(20, 90, 20), size=(60, 4, 60)), rng_for(0)
    for box in draw_boxes(info, CVAC, rng).globals_:
        assert box.start[1] >= 0
        assert box.stop[1] <= 100
        assert valid_tokens(box, (6, 6, 6), info.shape).all()


def test_flipped_views_flip_their_padding_too():
    box = ViewBox((-8, 0, 0), (16, 16, 16))
    turned = ViewBox(box.start, box.size, (True, False, False))
    plain = valid_tokens(box, (4, 2, 2), (50, 50, 50)).reshape(4, 4)
    assert (valid_tokens(turned, (4, 2, 2), (50, 50, 50)).reshape(4, 4) == plain[::-1]).all()


def test_sampling_refuses_tokens_that_do_not_fill_the_grid():
    with pytest.raises(ShapeError, match=r"Pass \(B, N, C\) tokens"):
        sample_tokens(torch.zeros(1, 27, 2), torch.zeros(1, 5, 3), (3, 3, 4))


def test_generators_depend_on_every_part():
    parts = [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a", "1"), (0, "a1")]
    drawn = sorted(rng_for(*p).random() for p in parts)
    assert all(low < high for low, high in pairwise(drawn))
    assert rng_for(0, "a", 1).random() == rng_for(0, "a", 1).random()
    first, second = (torch.rand(1, generator=torch_generator_for(*p)) for p in parts[:2])
    assert first != second
