"""Anatomy pyramids over present ids against 256 one-hot maps pooled to every scale.

python -m benchmarks.bench_regions [--quick]
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional

from agssd_core.views.regions import present_ids, region_pyramid
from benchmarks.timing import Comparison, compare, report

SCALES = (7, 14, 28, 56)
IDS, SIDE, CELL = 8, 224, 14


def label_maps(frames: int) -> Tensor:
    """(N, 224, 224) maps of eight anatomies in squares of 14 pixels, shifted off the cells."""
    generator = torch.Generator().manual_seed(0)
    cells = SIDE // CELL + 1
    coarse = torch.randint(IDS, (frames, cells, cells), generator=generator, dtype=torch.uint8)
    full = coarse.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
    return full[:, 5 : 5 + SIDE, 3 : 3 + SIDE].contiguous()


def plain_pyramid(labels: Tensor) -> list[Tensor]:
    """Ids of the cells, from all 256 maps at full size for each scale anew."""
    found = []
    for scale in SCALES:
        every = (torch.arange(256)[None, :, None, None] == labels[:, None]).float()
        found.append(functional.adaptive_avg_pool2d(every, scale).argmax(dim=1))
    return found


def our_pyramid(labels: Tensor) -> list[Tensor]:
    """The same ids; finding those present is part of it."""
    ids = present_ids(labels)
    return [
        ids.gather(1, scale.owner.flatten(1)).view_as(scale.owner)
        for scale in region_pyramid(labels, ids, SCALES)
    ]


def _same(plain: list[Tensor], ours: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))  # noqa: S101


def run(*, quick: bool = False) -> list[Comparison]:
    """Two views of eight frames; ``quick`` takes two frames and promises nothing."""
    labels = label_maps(2 if quick else 16)
    return [
        compare(
            f"anatomy pyramid of {len(labels)} maps at 4 scales, present ids vs 256 one-hot maps",
            lambda: plain_pyramid(labels),
            lambda: our_pyramid(labels),
            same=_same,
            repetitions=3 if quick else 5,
            calls=(1, 10),
            goals=(None, None) if quick else (50.0, None),
        )
    ]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two maps, nothing promised")
    torch.set_num_threads(1)
    return report(run(quick=parser.parse_args().quick))


if __name__ == "__main__":
    raise SystemExit(main())
