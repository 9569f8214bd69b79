"""Batches, augmentation and the prefetching loader."""

import gc
import threading

import numpy as np
import pytest
import torch

from agssd_core.errors import ShapeError
from agssd_core.views.batch import make_batch, volume_order
from agssd_core.views.geometry import (
    affine_box,
    box_affine,
    inner,
    overlap_fraction,
    sample_tokens,
    token_map,
)
from agssd_core.views.loader import BatchLoader
from agssd_core.views.reading import cut_view
from tests.support.volumes import MemoryVolumes, blob_volumes, memory_info, tiny_agssd

TINY = tiny_agssd()

VOLUMES = blob_volumes()


def _batch(volumes=VOLUMES, agssd=TINY, *, step=0, batch_size=4, seed=0, **options):
    return make_batch(
        volumes, agssd, seed=seed, site="site-a", step=step, batch_size=batch_size, **options
    )


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def _loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("agssd-views")]


def test_a_batch_has_the_shapes_it_promises():
    batch = _batch()
    assert batch.globals_clean.shape == batch.globals_seen.shape == (2, 4, 1, 32, 32, 32)
    assert batch.locals_seen.shape == (2, 4, 1, 16, 16, 16)
    assert batch.affine_g.shape == batch.affine_l.shape == (2, 4, 4, 4)
    assert batch.affine_g.dtype == torch.float64
    assert batch.q12.shape == batch.q21.shape == (4, 64, 3)
    flags = (batch.valid, batch.centre_in, batch.inner, batch.key_mask)
    assert {(tuple(flag.shape), flag.dtype) for flag in flags} == {((2, 4, 64), torch.bool)}
    assert batch.overlap.dtype == batch.q12.dtype == batch.globals_seen.dtype == torch.float32
    assert len(batch) == 4
    none = _batch(agssd=tiny_agssd(cvac={"n_local": 0}))
    assert none.locals_seen.shape == (0, 4, 1, 16, 16, 16)
    assert none.affine_l.shape == (0, 4, 4, 4)


def test_the_record_of_a_batch_gives_its_crops_back():
    batch = _batch()
    for b in range(4):
        array = VOLUMES.arrays[int(batch.volume_index[b])]
        boxes = [affine_box(batch.affine_g[v, b].numpy()) for v in range(2)]
        for v in range(2):
            again = cut_view(
                array, (0, 0, 0), box=boxes[v], out_size=(32, 32, 32), shape=array.shape
            )
            torch.testing.assert_close(batch.globals_clean[v, b, 0], again, atol=1e-5, rtol=0)
        assert batch.overlap[b].item() == pytest.approx(overlap_fraction(*boxes), abs=1e-6)
        there = token_map(box_affine(boxes[0]), box_affine(boxes[1]), (4, 4, 4))
        np.testing.assert_allclose(batch.q12[b], there, atol=1e-5)
        assert (batch.inner[0, b].numpy() == inner(there, (4, 4, 4))).all()


def test_both_views_show_the_same_anatomy_where_the_record_says_so():
    ramp = np.broadcast_to(np.linspace(0, 1, 60, dtype=np.float32)[:, None, None], (60, 60, 60))
    volumes = MemoryVolumes([ramp], [memory_info((60, 60, 60), start=(2, 2, 2), size=(56, 56, 56))])
    for step in range(8):
        batch = _batch(volumes, step=step, batch_size=2)
        for b in range(2):
            pooled = torch.nn.functional.avg_pool3d(batch.globals_clean[:, b], 8).reshape(2, 64, 1)
            for v, q in enumerate((batch.q12, batch.q21)):
                seen = sample_tokens(pooled[1 - v][None], q[b : b + 1], (4, 4, 4))[0]
                gap = (seen - pooled[v]).abs()[batch.inner[v, b]]
                assert gap.max() < 1e-3 / 60 * 10


def test_flags_nest_and_keys_surround_every_query():
    batch = _batch(batch_size=6)
    assert (batch.inner <= batch.centre_in).all()
    assert (batch.centre_in <= batch.key_mask).all()
    assert (batch.key_mask <= batch.valid).all()
    assert batch.inner.any(-1).all()


def test_padding_is_marked_and_nothing_else_is():
    thin = MemoryVolumes([np.full((40, 10, 40), 0.5, np.float32)], [memory_info((40, 10, 40))])
    batch = _batch(thin)
    assert not batch.valid.all()
    assert batch.valid.any(-1).all()
    assert not (batch.key_mask & ~batch.valid).any()
    assert (batch.globals_clean == 0.5).all()
    assert _batch().valid.all()


def test_augmentation_leaves_target_and_record_alone():
    plain = _batch(agssd=tiny_agssd(augment={"enabled": False}))
    strong = {"gamma_probability": 1, "noise_probability": 1, "blur_probability": 1}
    changed = _batch(agssd=tiny_agssd(augment={**strong, "mr_bias_probability": 1}))
    assert torch.equal(plain.globals_clean, plain.globals_seen)
    assert torch.equal(plain.globals_clean, changed.globals_clean)
    assert torch.equal(plain.affine_l, changed.affine_l)
    assert not torch.equal(changed.globals_seen, changed.globals_clean)
    assert changed.globals_clean.min() >= 0
    assert changed.globals_clean.max() <= 1


def test_a_batch_depends_on_its_arguments_alone():
    assert _same(_batch(), _batch())
    assert not torch.equal(_batch().affine_g, _batch(step=1).affine_g)
    assert not torch.equal(_batch().affine_g, _batch(seed=1).affine_g)


def test_ranks_share_the_batch_of_one_process():
    whole = _batch(batch_size=4)
    parts = [_batch(batch_size=2, share=(rank, 2)) for rank in range(2)]
    assert _same(whole.narrow(0, 2), parts[0])
    assert _same(whole.narrow(2, 2), parts[1])


def test_several_pairs_share_the_reads_of_one_volume():
    volumes = blob_volumes()
    agssd = tiny_agssd(cvac={"pairs_per_volume": 2})
    batch = _batch(volumes, agssd, batch_size=4)
    index = batch.volume_index.tolist()
    assert index[0] == index[1] != index[2] == index[3]
    assert not torch.equal(batch.affine_g[:, 0], batch.affine_g[:, 1])
    shared = len(volumes.reads)
    volumes.reads.clear()
    _batch(volumes, batch_size=4)
    assert shared < len(volumes.reads)
    parts = [_batch(volumes, agssd, batch_size=3, share=(rank, 2)) for rank in range(2)]
    whole = _batch(volumes, agssd, batch_size=6)
    assert _same(whole.narrow(0, 3), parts[0])
    assert _same(whole.narrow(3, 3), parts[1])


def test_reads_stay_small():
    volumes = blob_volumes(((150, 150, 150),))
    _batch(volumes, batch_size=2)
    assert max(max(size) for _, _, size in volumes.reads) < 80


def test_anisotropic_and_tiny_volumes_make_finite_batches():
    for shape in ((200, 30, 9), (16, 16, 16), (1, 40, 40), (33, 32, 31)):
        batch = _batch(blob_volumes((shape, shape)), batch_size=2)
        assert torch.isfinite(batch.globals_seen).all()
        assert batch.valid.any(-1).all()
        assert (batch.overlap >= TINY.cvac.rho[0] - 1e-6).all()


def test_every_pass_shows_every_volume_once():
    seen = [
        index
        for step in range(14)
        for index in volume_order(7, seed=0, site="a", step=step, batch_size=3)
    ]
    passes = [seen[low : low + 7] for low in range(0, 42, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert volume_order(2, seed=0, site="a", step=3, batch_size=5) == [
        *volume_order(2, seed=0, site="a", step=15, batch_size=1),
        *volume_order(2, seed=0, site="a", step=8, batch_size=2),
        *volume_order(2, seed=0, site="a", step=9, batch_size=2),
    ]
    with pytest.raises(ShapeError, match="Index and prepare the site first"):
        volume_order(0, seed=0, site="a", step=0, batch_size=1)


def test_parts_of_a_batch_put_together_are_the_batch():
    batch = _batch()
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 2]
    assert torch.equal(torch.cat([p.globals_seen for p in parts], 1), batch.globals_seen)
    assert torch.equal(torch.cat([p.q12 for p in parts]), batch.q12)
    assert torch.equal(torch.cat([p.volume_index for p in parts]), batch.volume_index)
    assert _same(batch.to("cpu"), batch)
    with pytest.raises(ShapeError, match=r"divisor of training\.batch_size"):
        batch.split(3)


def _loader(volumes=VOLUMES, workers=0):
    return BatchLoader(volumes, TINY, seed=0, site="a", batch_size=2, workers=workers)


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_no_bit(workers):
    expected = list(_loader().steps(5, 6))
    found = list(_loader(workers=workers).steps(5, 6))
    assert len(expected) == len(found) == 6
    assert all(_same(a, b) for a, b in zip(expected, found, strict=True))
    assert _same(expected[2], next(_loader().steps(7, 1))), "a step depends on where one starts"
    assert not _loader_threads()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_in_a_thread_reaches_the_caller_at_its_step(workers):
    order = [volume_order(3, seed=0, site="a", step=s, batch_size=2) for s in range(3)]
    healthy = next(index for index in range(3) if index not in order[0])
    volumes = MemoryVolumes(VOLUMES.arrays, VOLUMES.infos, broken=[healthy])
    steps = _loader(volumes, workers).steps(0, 6)
    assert len(next(steps)) == 2
    with pytest.raises(OSError, match="the disk is gone"):
        list(steps)
    assert not _loader_threads()


def test_leaving_early_ends_the_threads():
    steps = _loader(workers=3).steps(0, 1000)
    next(steps)
    assert _loader_threads()
    steps.close()
    assert not _loader_threads()
    for _ in _loader(workers=2).steps(0, 1000):
        break
    gc.collect()
    assert not _loader_threads()
