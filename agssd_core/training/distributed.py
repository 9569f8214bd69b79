"""Several processes at one site that train as one: each takes its share of the batch.

Everything that a step computes over the batch (standardisation, centres, Sinkhorn sums, EMA
statistics, the adaptive mask ratio, gradients) is summed over the processes, so P processes on
B / P volumes each equal one process on B. Gradients travel in one flat bucket after the last
backward pass of a step, which gradient accumulation needs anyway.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agssd_core.errors import TrainingError


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one site; ``ProcessGroup()`` is a single one and does nothing."""

    rank: int = 0
    size: int = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, without a gradient; the argument is left alone."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def sum_with_gradient(self, tensor: Tensor) -> Tensor:
        """Sum over processes; its gradient is summed over them as well."""
        if self.size == 1:
            return tensor
        total: Tensor = _SumOverProcesses.apply(tensor)  # type: ignore[no-untyped-call]
        return total

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Concatenate the processes' equal shares along ``dim`` in rank order, no gradient."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.detach().contiguous())
        return torch.cat(parts, dim=dim)

    def share(self, tensor: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor that spans the whole batch along ``dim``."""
        if self.size == 1:
            return tensor
        return tensor.chunk(self.size, dim=dim)[self.rank]

    def share_of_batch(self, batch_size: int) -> slice:
        """The positions of the batch that this process cuts and trains on.

        Raises:
            TrainingError: the batch cannot be shared equally.
        """
        if batch_size % self.size:
            raise TrainingError(
                f"training.batch_size = {batch_size} cannot be shared by {self.size} processes. "
                f"Use a multiple of {self.size}, or start fewer processes."
            )
        own = batch_size // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes, in one all-reduce."""
        if self.size == 1:
            return
        gradients = [item.grad for item in parameters if item.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
        shaped = [piece.view_as(grad) for piece, grad in zip(pieces, gradients, strict=True)]
        torch._foreach_copy_(gradients, shaped)


def current_group() -> ProcessGroup:
    """The group that was set up, or a single process."""
    if dist.is_available() and dist.is_initialized():
        return ProcessGroup(dist.get_rank(), dist.get_world_size())
    return ProcessGroup()


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ARG004
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ARG004
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
