"""Edge maps as shifted slices against dense single-channel conv3d, on the CPU.

The must is for the Sobel operator at 96^3. The Gaussian operator is compared at 48^3: its dense
kernels of 7^3 and 13^3 taps would take minutes at 96^3.

    python -m benchmarks.bench_edges [--quick]
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from agssd_core.views.edges import gaussian_magnitude, gaussian_taps, sobel_magnitude
from agssd_core.views.seeds import torch_generator_for
from benchmarks.timing import Comparison, compare, report

AGREE = 1e-5  # intensities are in [0, 1]


def dense_sobel(crops: Tensor) -> Tensor:
    """The same operator with one 3x3x3 kernel per direction."""
    return _dense_magnitude(crops, [0.25, 0.5, 0.25], [-0.5, 0.0, 0.5])


def dense_gaussian(crops: Tensor, sigma: float) -> Tensor:
    """The same operator with one dense derivative-of-Gaussian kernel per direction."""
    bell, slope = gaussian_taps(sigma)
    smooth = [*reversed(bell[1:]), *bell]
    differ = [*(-tap for tap in reversed(slope)), 0.0, *slope]
    return sigma * _dense_magnitude(crops, smooth, differ)


def _dense_magnitude(crops: Tensor, smooth: list[float], differ: list[float]) -> Tensor:
    s, d = torch.tensor(smooth), torch.tensor(differ)
    kernels = [
        torch.einsum("i,j,k->ijk", *(d if axis == turn else s for axis in range(3)))
        for turn in range(3)
    ]
    padded = F.pad(crops, (len(smooth) // 2,) * 6, mode="replicate")
    return F.conv3d(padded, torch.stack(kernels)[:, None]).square().sum(1, keepdim=True).sqrt()


def _same(slow: Tensor, fast: Tensor) -> None:
    torch.testing.assert_close(fast, slow, atol=AGREE, rtol=0)


def _crop(edge: int) -> Tensor:
    return torch.rand(1, 1, edge, edge, edge, generator=torch_generator_for(0, "edges"))


def _all_scales(way: Callable[[Tensor, float], Tensor], crop: Tensor) -> Tensor:
    return torch.maximum(way(crop, 1.0), way(crop, 2.0))


def run(*, quick: bool = False) -> list[Comparison]:
    """Both operators; ``quick`` takes smaller crops and promises nothing."""
    sobel_edge, gauss_edge = (32, 16) if quick else (96, 48)
    large, small = _crop(sobel_edge), _crop(gauss_edge)
    return [
        compare(
            f"Sobel edge map {sobel_edge}^3, shifted slices vs dense conv3d",
            lambda: dense_sobel(large),
            lambda: sobel_magnitude(large),
            same=_same,
            repetitions=9,
            calls=(1, 4),
            goals=(None, None) if quick else (8.0, 15.0),
        ),
        compare(
            f"Gaussian edge map {gauss_edge}^3 (sigma 1 and 2), shifted slices vs dense conv3d",
            lambda: _all_scales(dense_gaussian, small),
            lambda: _all_scales(gaussian_magnitude, small),
            same=_same,
            repetitions=3,
            calls=(1, 4),
        ),
    ]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller crops, nothing promised")
    torch.set_num_threads(1)
    return report(run(quick=parser.parse_args().quick))


if __name__ == "__main__":
    raise SystemExit(main())
