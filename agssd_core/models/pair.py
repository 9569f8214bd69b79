"""A student, its EMA teacher and their running state, and how they become named arrays."""

import numpy as np
import torch
from torch import Tensor, nn

from agssd_core.weights import ArraySpec, Schema, Weights, require_schema


class NetworkPair(nn.Module):
    """Two networks of which the teacher follows the student.

    The teacher's parameters are among the student's by name, start as a copy of them and never
    have gradients. Parameters and ``state_tensors`` are saved and federated; buffers of the
    networks are not.

    Args:
        student: trained.
        teacher: followed by EMA.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.teacher.requires_grad_(requires_grad=False)
        self.update_teacher(ema_momentum=0.0)

    @torch.no_grad()
    def update_teacher(self, *, ema_momentum: float) -> None:
        """Move the teacher towards the student, in place.

        Args:
            ema_momentum: m in [0, 1]; exactly 1 changes no bit, exactly 0 copies the student.

        Source:
            Tarvainen & Valpola 2017, arXiv:1703.01780, Eq. 2.
        """
        if ema_momentum == 1:
            return
        student = dict(self.student.named_parameters())
        names, targets = zip(*self.teacher.named_parameters(), strict=True)
        torch._foreach_lerp_(list(targets), [student[name] for name in names], 1 - ema_momentum)

    def state_tensors(self) -> dict[str, Tensor]:
        """Running statistics that are merged linearly across sites, without the group's name."""
        return {}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take up what ``state_tensors`` of the merged model would give."""
        for name, held in self.state_tensors().items():
            held.copy_(tensors[name])

    def shared_tensors(self, *, include_teacher: bool = True) -> dict[str, Tensor]:
        """What is saved and federated, by its full name.

        Parameters share the model's memory. Shared modules appear once; what is fixed does not
        appear.
        """
        groups: dict[str, nn.Module] = {"student": self.student}
        if include_teacher:
            groups["teacher"] = self.teacher
        named: dict[str, Tensor] = {
            f"{group}/{name}": parameter.detach()
            for group, network in groups.items()
            for name, parameter in network.named_parameters()
        }
        return named | {f"state/{name}": tensor for name, tensor in self.state_tensors().items()}

    def shared_schema(self, *, include_teacher: bool = True) -> Schema:
        """Names, shapes and dtypes of ``shared_weights``, sorted by name."""
        tensors = self.shared_tensors(include_teacher=include_teacher)
        return tuple(
            ArraySpec(name, tuple(tensors[name].shape), "float32") for name in sorted(tensors)
        )

    def shared_weights(self, *, include_teacher: bool = True) -> Weights:
        """Copies of ``shared_tensors`` as float32 NumPy arrays in C order."""
        tensors = self.shared_tensors(include_teacher=include_teacher)
        return {
            name: np.array(tensor.cpu().numpy(), dtype=np.float32, copy=True, order="C")
            for name, tensor in tensors.items()
        }

    @torch.no_grad()
    def load_shared_weights(self, weights: Weights, *, include_teacher: bool = True) -> None:
        """Copy arrays into the model, in place; nothing changes unless all of them fit.

        Args:
            weights: student and state groups, and the teacher's when it is included.
            include_teacher: False leaves the teacher as it is; a teacher group is then ignored.

        Raises:
            WeightsError: a name, shape or dtype differs.
        """
        if not include_teacher:
            weights = {n: array for n, array in weights.items() if not n.startswith("teacher/")}
        require_schema(weights, self.shared_schema(include_teacher=include_teacher))
        arrays = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
        for name, tensor in self.shared_tensors(include_teacher=include_teacher).items():
            if not name.startswith("state/"):
                tensor.copy_(arrays[name])
        self.load_state_tensors(
            {n.removeprefix("state/"): a for n, a in arrays.items() if n.startswith("state/")}
        )
