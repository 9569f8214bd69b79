"""The Gaussian mechanism: a sum that one patient changes by little, noised, over a constant."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from agssd_core.config import PrivacyConfig
from agssd_core.noise import NoiseStream


def normal_like(stream: NoiseStream, tensor: Tensor, *, deviation: float) -> Tensor:
    """Normal noise in the shape and type of a tensor, drawn in float64."""
    drawn = torch.from_numpy(stream.normal(tensor.numel()) * deviation)
    return drawn.view(tensor.shape).to(tensor)


def noised_mean(
    total: Tensor, *, limit: float, sigma: float, expected: float, stream: NoiseStream
) -> Tensor:
    """(total + N(0, (sigma limit)^2)) / expected.

    Args:
        total: sum over patients of tensors of norm ``limit`` at most.
        limit: what one patient can change the sum by.
        sigma: noise multiplier.
        expected: patients expected, a public constant; never the number that was drawn.
        stream: of the noise.

    Source:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.
    """
    return (total + normal_like(stream, total, deviation=sigma * limit)) / expected


def set_private_gradients(
    parameters: Sequence[nn.Parameter],
    totals: Sequence[Tensor],
    privacy: PrivacyConfig,
    stream: NoiseStream,
) -> None:
    """Put the noised mean of clipped gradients where an optimiser looks for gradients."""
    for parameter, total in zip(parameters, totals, strict=True):
        parameter.grad = noised_mean(
            total,
            limit=privacy.max_grad_norm,
            sigma=privacy.noise_multiplier,
            expected=privacy.expected_batch,
            stream=stream,
        )


def add_pull(
    parameters: Sequence[nn.Parameter], anchor: Sequence[Tensor] | None, strength: float
) -> None:
    """FedProx's pull towards the weights of the round's start, after the noise.

    It depends on weights alone, so it costs nothing.
    """
    for parameter, origin in zip(parameters, anchor or (), strict=False):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=strength)


class NoisedCentre:
    """The teacher's cls centre from the noised sum of patients' clipped mean logits.

    Args:
        privacy: ratio to the gradient's noise, greatest norm, expected batch.
        prototypes: K.
    """

    def __init__(self, privacy: PrivacyConfig, like: Tensor) -> None:
        self._privacy = privacy
        self._total = torch.zeros_like(like)

    def add(self, mean_logits: Tensor) -> None:
        """Take in (B, K), one row a patient; a row that is not finite counts as 0."""
        norm = mean_logits.norm(dim=1, keepdim=True)
        limit = self._privacy.centre_norm
        clipped = mean_logits * (limit / norm.clamp_min(limit))
        clipped = torch.where(norm.isfinite(), clipped, torch.zeros_like(clipped))
        self._total += clipped.sum(dim=0).to(self._total)

    def move(self, centre: Tensor, *, momentum: float, stream: NoiseStream) -> None:
        """Move a running centre in place by the step's noised mean, and start anew."""
        fresh = noised_mean(
            self._total,
            limit=self._privacy.centre_norm,
            sigma=self._privacy.centre_ratio * self._privacy.noise_multiplier,
            expected=self._privacy.expected_batch,
            stream=stream,
        )
        centre.lerp_(fresh, 1 - momentum)
        self._total.zero_()
