"""Means over the tokens of each crop, then over the crops."""

from dataclasses import dataclass

import torch
from torch import Tensor

from agssd_core.errors import ShapeError


@dataclass(frozen=True)
class RowMeans:
    """Mean of each row's tokens.

    Attributes:
        means: (R,) 0 where a row has no token.
        counts: (R,) tokens (or their weight) in each row.
    """

    means: Tensor
    counts: Tensor

    @property
    def present(self) -> Tensor:
        """(R,) bool: rows with at least one token."""
        return self.counts > 0

    def mean(self) -> Tensor:
        """Mean over the rows that have tokens; 0, with a gradient of 0, when none has."""
        return self.means.sum() / self.present.sum().clamp_min(1)


def row_means(values: Tensor, row: Tensor, *, rows: int, weights: Tensor | None = None) -> RowMeans:
    """Average flat token values within each row (crop of a volume).

    Args:
        values: (P,) one value per token.
        row: (P,) long, which of the R rows the token belongs to.
        rows: R.
        weights: (P,) not negative; None weighs every token alike.

    Raises:
        ShapeError: lengths differ.
    """
    if values.shape != row.shape or (weights is not None and weights.shape != row.shape):
        raise ShapeError(
            f"{tuple(values.shape)} values do not fit {tuple(row.shape)} row numbers. Flatten both "
            "with the same token index."
        )
    amounts = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    counts = values.new_zeros(rows).index_add(0, row, amounts)
    sums = values.new_zeros(rows).index_add(0, row, values * amounts)
    empty = counts <= 0
    return RowMeans(sums / torch.where(empty, torch.ones_like(counts), counts), counts)
