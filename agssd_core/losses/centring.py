"""Teacher targets: centring and sharpening, or Sinkhorn-Knopp."""

from collections.abc import Callable

import torch
from torch import Tensor

from agssd_core.losses.precision import full, no_autocast

AllSum = Callable[[Tensor], Tensor]
_TINY = 1e-30


def centred_softmax(logits: Tensor, centre: Tensor | None, *, temperature: float) -> Tensor:
    """Centre, sharpen, normalise.

    Args:
        logits: (..., K) teacher scores.
        centre: broadcastable to them: (K,), or (..., 1, K) when each volume is centred over its
            own tokens (``target = volume``); None leaves them as they are.
        temperature: teacher softmax temperature, above 0.

    Returns:
        (..., K) float32, rows sum to 1.

    Source:
        Caron et al. 2021, arXiv:2104.14294, section 3.1, "Avoiding collapse".
    """
    logits = full(logits)
    return ((logits if centre is None else logits - centre) / temperature).softmax(dim=-1)


def updated_centre(
    centre: Tensor, mean_logits: Tensor, *, momentum: float, all_sum: AllSum | None = None
) -> Tensor:
    """Exponential moving average of the batch's mean logits, without gradient.

    Args:
        centre: (K,) present centre.
        mean_logits: (..., K) logits, or means of equally many logits each.
        momentum: in [0, 1]; 1 changes nothing.
        all_sum: sum over processes; None is one process.

    Returns:
        (K,) new centre; the caller stores it.

    Source:
        Caron et al. 2021, arXiv:2104.14294, Eq. 4.
    """
    with torch.no_grad():
        total = all_sum if all_sum is not None else _itself
        rows = full(mean_logits.detach()).reshape(-1, mean_logits.shape[-1])
        count = total(rows.new_full((1,), float(len(rows))))
        fresh = total(rows.sum(dim=0)) / count.clamp_min(1)
        # Without any row there is nothing to learn from.
        return torch.where(count > 0, momentum * centre + (1 - momentum) * fresh, centre)


def sinkhorn(
    logits: Tensor, *, temperature: float, iterations: int = 3, all_sum: AllSum | None = None
) -> Tensor:
    """Targets that use all prototypes alike, by Sinkhorn-Knopp.

    The scaling is kept as one factor per token and one per prototype, so each pass is two
    matrix-vector products and no (P, K) array is rewritten.

    Args:
        logits: (P, K) teacher scores of this process.
        temperature: teacher softmax temperature, above 0.
        iterations: passes over columns, then rows.
        all_sum: sum over processes; None is one process.

    Returns:
        (P, K) float32 without gradient: rows sum to 1, columns nearly to P / K.

    Source:
        Cuturi 2013, arXiv:1306.0895, Algorithm 1; Caron et al. 2020 (SwAV), arXiv:2006.09882,
        Eq. 5 and appendix A.
    """
    with torch.no_grad(), no_autocast(logits):
        total = all_sum if all_sum is not None else _itself
        scaled = full(logits.detach()) / temperature
        ones = scaled.new_ones(1)
        peak = scaled.max().reshape(1) if scaled.numel() else torch.zeros_like(ones)
        # Any shift cancels out as long as all processes take the same one.
        kernel = (scaled - total(peak) / total(ones)).exp()
        per_token = kernel.new_ones(kernel.shape[0])
        per_prototype = kernel.new_ones(kernel.shape[1])
        for _ in range(iterations):
            per_prototype = 1 / total(per_token @ kernel).clamp_min(_TINY)
            per_token = 1 / (kernel @ per_prototype).clamp_min(_TINY)
        return kernel * per_prototype * per_token[:, None]


def _itself(x: Tensor) -> Tensor:
    return x
