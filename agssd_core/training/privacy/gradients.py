"""Gradients patient by patient, clipped and summed; the heart of the guarantee.

One patient is one row of every layer's first axis. Opacus' hooks add up what the layers' several
calls (views, crops, terms) give for a row, so the norm that is clipped is that of the patient's
whole gradient.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import Tensor, nn

from agssd_core.errors import TrainingError
from agssd_core.training.privacy.samplers import forget_grids, watch_grids

log = logging.getLogger(__name__)

Losses = Callable[[Sequence[int]], Tensor]
# A norm in float32 is off by less; with it a clipped gradient never exceeds the limit.
_SLACK = 1e-5


class ClippedSum:
    """Sum over the patients of a step of their clipped gradients.

    Args:
        network: whose trainable parameters count; every layer sees patients on axis 0.
        max_grad_norm: C.
        mode: ``hooks`` or ``fast-gradient-clipping``.

    Raises:
        TrainingError: a layer keeps statistics of what passes through it.
    """

    def __init__(self, network: nn.Module, *, max_grad_norm: float, mode: str) -> None:
        require_no_statistics(network)
        self._network, self._limit = network, max_grad_norm
        self._names = {id(item): name for name, item in network.named_parameters()}
        self.parameters = [item for item in network.parameters() if item.requires_grad]
        self._totals: list[Tensor] = []
        watch_grids(network)
        # Opacus refuses every buffer; the ones left here are constants, as has been looked at.
        if mode == "hooks":
            self._hooks = GradSampleModule(network, loss_reduction="sum", strict=False)
            self._add = self._add_gradients
        else:
            self._hooks = GradSampleModuleFastGradientClipping(
                network,
                loss_reduction="sum",
                strict=False,
                max_grad_norm=max_grad_norm,
                use_ghost_clipping=False,  # cannot handle more than one call of a layer
            )
            self._add = self._add_by_norms
        self.reset()

    def reset(self) -> None:
        """Start a step."""
        self._totals = [torch.zeros_like(item) for item in self.parameters]
        self._clear()

    def add(self, losses: Losses, patients: int) -> None:
        """Take some patients in.

        Args:
            losses: patients (indices) to their losses, one each, in one pass.
            patients: how many there are; all are asked for, 0 does nothing.

        A patient whose gradient is not finite adds nothing; the step goes on and is noised.

        Raises:
            TrainingError: a layer's gradient is not one row a patient.
        """
        if patients:
            with _quiet():
                self._add(losses, patients)
            self._clear()

    def totals(self) -> list[Tensor]:
        """The sum so far, a tensor for each of ``parameters``."""
        return self._totals

    def _add_gradients(self, losses: Losses, patients: int) -> None:
        losses(range(patients)).sum().backward()  # type: ignore[no-untyped-call]
        rows = [self._rows(item, "grad_sample", patients) for item in self.parameters]
        factors = self._factors(torch.stack([row.flatten(1).norm(dim=1) for row in rows]))
        lost = factors == 0
        for total, row in zip(self._totals, rows, strict=True):
            if bool(lost.any()):
                row[lost] = 0  # 0 times infinity is not 0
            total += torch.tensordot(factors.to(row.dtype), row, dims=1)

    def _add_by_norms(self, losses: Losses, patients: int) -> None:
        """Two passes back: one for norms, one for the sum that they weigh."""
        each = losses(range(patients))
        each.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        norms = [self._rows(item, "_norm_sample", patients) for item in self.parameters]
        factors = self._factors(torch.stack(norms))
        self._clear()
        self._hooks.disable_hooks()
        try:
            if bool((factors > 0).all()):
                self._take((each * factors.to(each)).sum())
                return
            del each
            for patient in factors.nonzero()[:, 0].tolist():  # nothing of the others may mix in
                self._take((losses([patient]) * factors[patient]).sum())
        finally:
            self._hooks.enable_hooks()

    def _take(self, loss: Tensor) -> None:
        for total, gradient in zip(
            self._totals, torch.autograd.grad(loss, self.parameters), strict=True
        ):
            total += gradient

    def _rows(self, parameter: nn.Parameter, kept: str, patients: int) -> Tensor:
        rows = getattr(parameter, kept, None)
        if not isinstance(rows, Tensor) or len(rows) != patients:
            raise TrainingError(
                f"the gradient of {self._names[id(parameter)]} is not one row for each patient of "
                "the batch, so nothing may be trained. Report this with your configuration."
            )
        return rows

    def _factors(self, norms: Tensor) -> Tensor:
        """(B,) min(1, C / norm) from (parameters, B) norms; 0 where not finite."""
        norm = norms.double().norm(dim=0)
        finite = norm.isfinite()
        if not bool(finite.all()):
            log.warning("%d gradient(s) were not finite and count as 0", int((~finite).sum()))
        factor = (self._limit / (norm * (1 + _SLACK))).clamp(max=1)
        return torch.where(finite, factor, torch.zeros_like(factor))

    def _clear(self) -> None:
        forget_grids(self._network)
        for item in self.parameters:
            item.grad = None
            item.grad_sample = None  # type: ignore[attr-defined]
            if hasattr(item, "_norm_sample"):
                del item._norm_sample


@contextmanager
def _quiet() -> Iterator[None]:
    """The first layers' inputs are voxels; that they want no gradient is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        yield


def require_no_statistics(network: nn.Module) -> None:
    """Refuse layers through which patients meet, or that remember them.

    Raises:
        TrainingError: there is a BatchNorm, an InstanceNorm that keeps statistics, or dropout.
    """
    for module in network.modules():
        norm = isinstance(module, nn.modules.batchnorm._NormBase)
        kept = norm and (
            isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats
        )
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if kept or drops:
            raise TrainingError(
                f"{type(module).__name__} lets patients of a batch meet, so their gradients cannot "
                "be told apart. Use LayerNorm or GroupNorm, and no dropout."
            )
