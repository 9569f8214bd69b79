"""LARS, the optimiser of the ultrasound cohort, as one fused pass over all parameters.

Source: You et al. 2017, arXiv:1708.03888, with BYOL's exclusions (Grill et al. 2020,
arXiv:2006.07733, appendix): biases and norm parameters have neither decay nor trust ratio.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from agssd_core.errors import TrainingError


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rates: d = (g + wd w) * local * lr; v = mu v + d; w = w - v.

    ``local`` is trust * |w| / (|g| + wd |w|), or 1 where a norm is 0. Parameters of one dimension
    (biases, norms) take plain momentum steps. The learning rate stands inside the buffer, so a
    change of it acts on new gradients only.

    Args:
        parameters: of the student.
        learning_rate: of the next step; set anew at every step.
        momentum, weight_decay, trust: as above.

    Raises:
        TrainingError: a number is negative, or the momentum is 1 or more.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        learning_rate: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust: float = 1e-3,
    ) -> None:
        if min(learning_rate, momentum, weight_decay, trust) < 0 or momentum >= 1:
            raise TrainingError(
                f"LARS takes no negative number and a momentum below 1; it was given learning rate "
                f"{learning_rate:g}, momentum {momentum:g}, weight decay {weight_decay:g}, trust "
                f"{trust:g}. Mend anaus.optimiser."
            )
        defaults = {
            "lr": learning_rate,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
        }
        super().__init__(list(parameters), defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step from the gradients at hand; parameters without one stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [item for item in group["params"] if item.grad is not None]
            if moved:
                self._move(moved, group)
        return loss

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        steps: list[Tensor] = [item.grad for item in parameters if item.grad is not None]
        wide = [index for index, item in enumerate(parameters) if item.dim() > 1]
        if wide:
            adapted = _adapted(
                [parameters[i] for i in wide],
                [steps[i] for i in wide],
                decay=group["weight_decay"],
                trust=group["trust"],
            )
            for index, step in zip(wide, adapted, strict=True):
                steps[index] = step
        scaled = torch._foreach_mul(steps, group["lr"])
        buffers = [self._buffer(item) for item in parameters]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, scaled)
        torch._foreach_sub_(parameters, buffers)

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        found: Tensor = state["momentum_buffer"]
        return found


def _adapted(
    weights: list[Tensor], gradients: list[Tensor], *, decay: float, trust: float
) -> list[Tensor]:
    """(g + decay w) times each tensor's local rate; no value is read on the host."""
    sizes = torch.stack(torch._foreach_norm(weights))
    slopes = torch.stack(torch._foreach_norm(gradients))
    local = trust * sizes / (slopes + decay * sizes)
    local = torch.where((sizes > 0) & (slopes > 0), local, torch.ones_like(local))
    decayed = torch._foreach_add(gradients, weights, alpha=decay)
    torch._foreach_mul_(decayed, list(local.unbind()))
    return list(decayed)
