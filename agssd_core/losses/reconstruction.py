"""Masked voxels: what the student's decoder must recover."""

import torch
from torch import Tensor

from agssd_core.errors import ShapeError
from agssd_core.losses.precision import full
from agssd_core.losses.rows import RowMeans, row_means

_PIXEL_EPSILON = 1e-6


def patchify(crops: Tensor, patch_size: int) -> Tensor:
    """Cut crops into the voxels of each token.

    Args:
        crops: (M, 1, D, H, W), sides multiples of the patch size.
        patch_size: p, voxels.

    Returns:
        (M, N, p^3); tokens and voxels in C order of (depth, height, width).

    Raises:
        ShapeError: not one channel, or a side is not a multiple of the patch size.
    """
    if crops.ndim != 5 or crops.shape[1] != 1 or any(s % patch_size for s in crops.shape[2:]):
        raise ShapeError(
            f"crops of shape {tuple(crops.shape)} cannot be cut into {patch_size}-voxel cubes. "
            "Pass (M, 1, D, H, W) with sides that are multiples of the patch size."
        )
    p, (depth, height, breadth) = patch_size, crops.shape[2:]
    cut = crops.reshape(len(crops), depth // p, p, height // p, p, breadth // p, p)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 6).flatten(1, 3)


def normalised_patches(patches: Tensor) -> Tensor:
    """Each patch with mean 0 and variance 1 (``loss.norm_pix``).

    Source:
        He et al. 2022 (MAE), arXiv:2111.06377, section 3, "Reconstruction target".
    """
    variance, mean = torch.var_mean(full(patches), dim=-1, keepdim=True)
    return (patches - mean) * torch.rsqrt(variance + _PIXEL_EPSILON)


def edge_weights(edge_patches: Tensor, *, strength: float) -> Tensor:
    """Voxel weights 1 + eta * E of edge strength E in [0, 1]; eta 0 gives ones."""
    return 1 + strength * edge_patches


def masked_l1(
    prediction: Tensor, target: Tensor, row: Tensor, *, rows: int, weights: Tensor | None = None
) -> Tensor:
    """Mean absolute error over masked voxels, per crop first, then over the crops.

    Arguments and errors are those of ``masked_l1_rows``.

    Returns:
        Scalar, in units of the target ([0, 1] voxels). 0 when nothing is masked.

    Source:
        Masked voxel regression with L1 as in SMIT (Jiang et al. 2022, arXiv:2205.10342, Eq. 1).
    """
    return masked_l1_rows(prediction, target, row, rows=rows, weights=weights).mean()


def masked_l1_rows(
    prediction: Tensor, target: Tensor, row: Tensor, *, rows: int, weights: Tensor | None = None
) -> RowMeans:
    """Mean absolute error over the masked voxels of each crop.

    Args:
        prediction: (P, p^3) decoder output of the P masked tokens.
        target: (P, p^3) clean voxels of the same tokens.
        row: (P,) which of the R crops a token belongs to.
        rows: R.
        weights: (P, p^3) of the voxels; they are normalised within a crop, so a stronger edge
            weight does not make the whole term larger. None weighs all alike.

    Raises:
        ShapeError: shapes differ.
    """
    if prediction.shape != target.shape or prediction.ndim != 2:
        raise ShapeError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must be the "
            "same (tokens, voxels) array. Select both with the same token index."
        )
    error = (full(prediction) - full(target)).abs()
    if weights is None:
        return row_means(error.mean(dim=-1), row, rows=rows)
    weights = full(weights)
    amount = weights.sum(dim=-1)
    weighted = (error * weights).sum(dim=-1) / amount.clamp_min(1e-12)
    return row_means(weighted, row, rows=rows, weights=amount)


def best_constant_l1(target: Tensor, row: Tensor, *, rows: int) -> Tensor:
    """Masked L1 of the best constant guess for each crop: the yardstick of reconstruction.

    The constant that minimises an absolute error is the median.

    Args:
        target: (P, p^3) masked voxels.
        row: (P,) which of the R crops a token belongs to.
        rows: R.

    Returns:
        Scalar without gradient; 0 when nothing is masked.
    """
    with torch.no_grad():
        errors = []
        for number in range(rows):
            voxels = full(target[row == number]).flatten()
            if voxels.numel():
                errors.append((voxels - voxels.median()).abs().mean())
        return torch.stack(errors).mean() if errors else target.new_zeros(())
