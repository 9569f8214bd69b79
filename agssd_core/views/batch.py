"""One step's views as tensors, cut from a site's volumes.

A batch depends on its arguments alone: every random number comes from
``(seed, site, step, position)``, so any number of loader threads gives the same bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from agssd_core.config import AgssdConfig
from agssd_core.config.node import Size3
from agssd_core.errors import ShapeError
from agssd_core.views.augment import apply_photometric, draw_photometric
from agssd_core.views.crops import ViewBoxes, draw_boxes
from agssd_core.views.geometry import (
    BoolArray,
    FloatArray,
    ViewBox,
    box_affine,
    centre_in,
    inner,
    key_tokens,
    overlap_fraction,
    overlap_region,
    token_map,
)
from agssd_core.views.reading import VolumeLike, VolumeReader, cut_views, valid_tokens
from agssd_core.views.seeds import rng_for

BATCH_FIRST = frozenset({"q12", "q21", "overlap", "volume_index"})


@dataclass
class ViewBatch:
    """The views of B volumes: T = 2 global ones and L local ones each.

    Attributes:
        globals_clean: (2, B, 1, D, H, W) float32 in [0, 1], never augmented: target and edges.
        globals_seen: (2, B, 1, D, H, W) float32, augmented.
        locals_seen: (L, B, 1, d, h, w) float32, augmented; L may be 0.
        affine_g: (2, B, 4, 4) float64, view frame to voxels; ``affine_box`` gives the box back.
        affine_l: (L, B, 4, 4) float64.
        q12: (B, N, 3) float32, the first view's token centres in the second view's frame.
        q21: (B, N, 3) float32, the other way round.
        valid: (2, B, N) bool, tokens that are not padding.
        centre_in: (2, B, N) bool, real tokens whose centre lies in the other view.
        inner: (2, B, N) bool, those of them that may be interpolated in the other view.
        key_mask: (2, B, N) bool, real tokens in the overlap dilated by one token: the keys that
            the *other* view's tokens may attend to.
        overlap: (B,) float32, share of the smaller global view that both show.
        volume_index: (B,) int64, index in the site's volumes.
    """

    globals_clean: Tensor
    globals_seen: Tensor
    locals_seen: Tensor
    affine_g: Tensor
    affine_l: Tensor
    q12: Tensor
    q21: Tensor
    valid: Tensor
    centre_in: Tensor
    inner: Tensor
    key_mask: Tensor
    overlap: Tensor
    volume_index: Tensor

    def __len__(self) -> int:
        """Volumes in the batch, B."""
        return int(self.overlap.shape[0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "ViewBatch":
        """Copy to a device; affines stay where they are needed, on the CPU."""
        return self._map(
            lambda name, tensor: (
                tensor
                if name.startswith("affine")
                else tensor.to(device, non_blocking=non_blocking)
            )
        )

    def pin_memory(self) -> "ViewBatch":
        """Page-lock the tensors, so that ``to(..., non_blocking=True)`` overlaps with the step."""
        return self._map(lambda _, tensor: tensor.pin_memory())

    def narrow(self, start: int, length: int) -> "ViewBatch":
        """The volumes ``start`` to ``start + length`` as views of the same memory."""
        return self._map(
            lambda name, tensor: tensor.narrow(int(name not in BATCH_FIRST), start, length)
        )

    def split(self, parts: int) -> list["ViewBatch"]:
        """Equal parts for gradient accumulation.

        Raises:
            ShapeError: the batch cannot be divided evenly.
        """
        if parts < 1 or len(self) % parts:
            raise ShapeError(
                f"a batch of {len(self)} volumes cannot be cut into {parts} equal parts. Use a "
                "divisor of training.batch_size."
            )
        length = len(self) // parts
        return [self.narrow(part * length, length) for part in range(parts)]

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> "ViewBatch":
        names = [field.name for field in fields(self)]
        return replace(self, **{name: change(name, getattr(self, name)) for name in names})


def volume_order(count: int, *, seed: int, site: str, step: int, batch_size: int) -> list[int]:
    """Volumes, or frames, of one step: every pass over the data is a new seeded permutation.

    A pure function of its arguments; no state is kept between steps, so a run resumes anywhere.
    """
    if count < 1:
        raise ShapeError("there is nothing to draw from. Index and prepare the site first.")
    first = step * batch_size
    chosen: list[int] = []
    for pass_ in range(first // count, (first + batch_size - 1) // count + 1):
        order = rng_for(seed, site, "order", pass_).permutation(count)
        low = max(first - pass_ * count, 0)
        high = min(first + batch_size - pass_ * count, count)
        chosen.extend(int(index) for index in order[low:high])
    return chosen


def make_batch(
    volumes: VolumeReader,
    agssd: AgssdConfig,
    *,
    seed: int,
    site: str,
    step: int,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
) -> ViewBatch:
    """Cut the views of one step.

    Args:
        volumes: the site's volumes.
        agssd: crops, augmentation, patch size.
        seed: of the run.
        site: name of the site; part of the seed.
        step: global step.
        batch_size: volumes of this process.
        share: (rank, processes) at a site with several GPUs; the parts together are the batch
            that one process would draw with ``batch_size * processes``.
    """
    rank, processes = share
    pairs = agssd.cvac.pairs_per_volume
    total = batch_size * processes
    order = volume_order(
        len(volumes), seed=seed, site=site, step=step, batch_size=-(-total // pairs)
    )
    positions = range(rank * batch_size, (rank + 1) * batch_size)
    items: list[PairItem] = []
    for slot in range(positions[0] // pairs, positions[-1] // pairs + 1):
        mine = [p for p in range(slot * pairs, (slot + 1) * pairs) if p in positions]
        rngs = [rng_for(seed, site, "views", step, position) for position in mine]
        items.extend(cut_volume(volumes, order[slot], agssd, rngs))
    return collate(items, agssd)


@dataclass(frozen=True)
class PairItem:
    """The views of one pair before they are stacked."""

    index: int
    shape: Size3
    boxes: ViewBoxes
    clean: list[Tensor]
    seen: list[Tensor]
    locals_: list[Tensor]


def cut_volume(
    volumes: VolumeReader, index: int, agssd: AgssdConfig, rngs: list[np.random.Generator]
) -> list[PairItem]:
    """Cut one pair per generator, all from the same few reads of the volume."""
    info = volumes.infos[index]
    drawn = [draw_boxes(info, agssd.cvac, rng) for rng in rngs]
    wanted: list[tuple[ViewBox, Size3]] = []
    for boxes in drawn:
        wanted += [(box, agssd.cvac.global_size) for box in boxes.globals_]
        wanted += [(box, agssd.cvac.local_size) for box in boxes.locals_]
    crops = iter(cut_views(volumes, index, wanted))
    items = []
    for boxes, rng in zip(drawn, rngs, strict=True):
        clean = [next(crops) for _ in boxes.globals_]
        seen = [_augmented(crop, info, agssd, rng) for crop in clean]
        locals_ = [_augmented(next(crops), info, agssd, rng) for _ in boxes.locals_]
        items.append(PairItem(index, info.shape, boxes, clean, seen, locals_))
    return items


def _augmented(
    crop: Tensor, info: VolumeLike, agssd: AgssdConfig, rng: np.random.Generator
) -> Tensor:
    return apply_photometric(crop, draw_photometric(info.modality, agssd.augment, rng))


def collate(items: list[PairItem], agssd: AgssdConfig) -> ViewBatch:
    """Stack pairs of views, at least one, and say where they see the same."""
    grid = token_grid(agssd)
    links = [_correspondence(item, grid) for item in items]
    locals_ = len(items[0].locals_)
    small = (locals_, len(items), 1, *agssd.cvac.local_size)
    return ViewBatch(
        globals_clean=_stack([item.clean for item in items]),
        globals_seen=_stack([item.seen for item in items]),
        locals_seen=_stack([item.locals_ for item in items]) if locals_ else torch.zeros(small),
        affine_g=_affines([item.boxes.globals_ for item in items]),
        affine_l=_affines([item.boxes.locals_ for item in items]),
        q12=torch.from_numpy(np.stack([link.q12 for link in links])).float(),
        q21=torch.from_numpy(np.stack([link.q21 for link in links])).float(),
        valid=_flags([link.valid for link in links]),
        centre_in=_flags([link.centre_in for link in links]),
        inner=_flags([link.inner for link in links]),
        key_mask=_flags([link.key_mask for link in links]),
        overlap=torch.tensor([overlap_fraction(*item.boxes.globals_) for item in items]).float(),
        volume_index=torch.tensor([item.index for item in items]),
    )


def token_grid(agssd: AgssdConfig) -> Size3:
    """Tokens of a global view per axis."""
    d, h, w = (side // agssd.model.patch_size for side in agssd.cvac.global_size)
    return d, h, w


@dataclass(frozen=True)
class _Correspondence:
    """Token maps (N, 3) and flags, one (N,) array per global view."""

    q12: FloatArray
    q21: FloatArray
    valid: list[BoolArray]
    centre_in: list[BoolArray]
    inner: list[BoolArray]
    key_mask: list[BoolArray]


def _correspondence(item: PairItem, grid: Size3) -> _Correspondence:
    pair = item.boxes.globals_
    first, second = (box_affine(box) for box in pair)
    maps = [token_map(first, second, grid), token_map(second, first, grid)]
    valid = [valid_tokens(box, grid, item.shape) for box in pair]
    shared = overlap_region(*pair)
    keys = [key_tokens(affine, shared, grid) for affine in (first, second)]
    return _Correspondence(
        q12=maps[0],
        q21=maps[1],
        valid=valid,
        centre_in=[centre_in(q) & real for q, real in zip(maps, valid, strict=True)],
        inner=[inner(q, grid) & real for q, real in zip(maps, valid, strict=True)],
        key_mask=[key & real for key, real in zip(keys, valid, strict=True)],
    )


def _stack(views: list[list[Tensor]]) -> Tensor:
    """B lists of V crops (D, H, W) to (V, B, 1, D, H, W), copied once."""
    count, size = len(views[0]), views[0][0].shape
    stacked = torch.empty((count, len(views), 1, *size))
    for b, crops in enumerate(views):
        for v, crop in enumerate(crops):
            stacked[v, b, 0] = crop
    return stacked


def _affines(boxes: Sequence[tuple[ViewBox, ...]]) -> Tensor:
    rows = [[box_affine(box) for box in group] for group in boxes]
    stacked = np.asarray(rows, dtype=np.float64).reshape(len(boxes), -1, 4, 4)
    return torch.from_numpy(stacked.swapaxes(0, 1).copy())


def _flags(per_volume: list[list[BoolArray]]) -> Tensor:
    """B lists of two (N,) arrays to (2, B, N)."""
    return torch.from_numpy(np.asarray(per_volume).swapaxes(0, 1).copy())
