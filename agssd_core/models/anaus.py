"""ANAUS's student and teacher: ResNet, linear pyramid, projectors, predictor.

Source: the ANAUS paper's figure and supplement (arXiv:2605.25402). The coarsest scale pools the
backbone's c5 and has a projector of its own; the finer ones pool the pyramid's p4, p3 and p2 and
share one. A single predictor serves all scales.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agssd_core.errors import ShapeError
from agssd_core.models.fpn import FeaturePyramid
from agssd_core.models.pair import NetworkPair
from agssd_core.models.precision import full
from agssd_core.models.resnet2d import ResNetBackbone, ResnetShape

# The usual statistics of natural images, so that weights are exchangeable with torchvision's.
GREY_MEAN, GREY_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COARSEST = 3
_STATISTICS = "statistics."


@dataclass(frozen=True)
class AnausShape:
    """Everything that fixes the model's arrays.

    Attributes:
        backbone: the ResNet; its norm is the heads' as well.
        fpn: channels of p2, p3 and p4.
        hidden_projector, projection, hidden_predictor: widths of the heads.
        share_statistics: BatchNorm's statistics are part of the running state.
    """

    backbone: ResnetShape
    fpn: int = 256
    hidden_projector: int = 1024
    projection: int = 256
    hidden_predictor: int = 4096
    share_statistics: bool = False


class RowGroupNorm(nn.GroupNorm):
    """GroupNorm of every row by itself, whatever axes lie before the channels."""

    def forward(self, rows: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return super().forward(rows.flatten(0, -2)).view(rows.shape)


class RegionMlp(nn.Module):
    """Linear, norm, ReLU, linear over rows of sampled anatomies; float32 at least.

    Args:
        width, hidden, out: channels.
        backbone: its norm is used here too; GroupNorm looks at one row at a time.
    """

    def __init__(self, width: int, hidden: int, out: int, *, backbone: ResnetShape) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.norm: nn.Module = (
            RowGroupNorm(backbone.groups, hidden)
            if backbone.norm == "group"
            else nn.BatchNorm1d(hidden)
        )
        self.outer = nn.Linear(hidden, out)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., width) -> (..., out)."""
        with torch.autocast(rows.device.type, enabled=False):
            # BatchNorm wants its rows along one axis; per-patient gradients want them apart.
            apart = isinstance(self.norm, RowGroupNorm)
            given = full(rows) if apart else full(rows).flatten(0, -2)
            out: Tensor = self.outer(torch.relu(self.norm(self.inner(given))))
            return out.view(*rows.shape[:-1], -1)


class AnausNetwork(nn.Module):
    """Backbone, pyramid and projectors; a student also has the predictor.

    Attributes:
        projector_coarse: of c5. projector_fine: of p4, p3 and p2.
        predictor: None in a teacher.
    """

    grey_mean: Tensor
    grey_std: Tensor

    def __init__(self, shape: AnausShape, *, student: bool) -> None:
        super().__init__()
        kind, out = shape.backbone, shape.projection
        self.backbone = ResNetBackbone(kind)
        self.pyramid = FeaturePyramid(self.backbone.channels, shape.fpn)
        self.projector_coarse = RegionMlp(
            self.backbone.channels[-1], shape.hidden_projector, out, backbone=kind
        )
        self.projector_fine = RegionMlp(shape.fpn, shape.hidden_projector, out, backbone=kind)
        self.predictor = (
            RegionMlp(out, shape.hidden_predictor, out, backbone=kind) if student else None
        )
        self.register_buffer("grey_mean", torch.tensor(GREY_MEAN)[:, None, None], persistent=False)
        self.register_buffer("grey_std", torch.tensor(GREY_STD)[:, None, None], persistent=False)

    def maps(self, frames: Tensor) -> list[Tensor]:
        """Feature maps c2 to c5 of grey frames.

        Args:
            frames: (M, 1, S, S) in [0, 1]; the grey value serves as all three colours.

        Raises:
            ShapeError: S is no multiple of 32.
        """
        colours = (frames - self.grey_mean) / self.grey_std
        found: list[Tensor] = self.backbone(colours.contiguous(memory_format=torch.channels_last))
        return found

    def pooled(self, maps: list[Tensor], weights: Tensor, level: int) -> Tensor:
        """Means of a scale's features under masks, never under autocast.

        Args:
            maps: c2 to c5, of the weights' type.
            weights: (M, R, S * S) as of ``regions.pooling_weights``.
            level: 0 for p2, 1 for p3, 2 for p4, 3 for c5.

        Returns:
            (M, R, C).
        """
        with torch.autocast(weights.device.type, enabled=False):
            return self.pyramid.pooled(maps, weights, level)

    def projector(self, level: int) -> RegionMlp:
        """The projector of a scale, see ``pooled``."""
        return self.projector_coarse if level == COARSEST else self.projector_fine


class AnausPair(NetworkPair):
    """Student and teacher. Both stay in training mode: each uses its own batch's statistics.

    Running statistics of BatchNorm are kept for exports alone. They stay at the site unless
    ``share_statistics``; then means and second moments are part of the state, and their linear
    merge is the merge of the sites' moments.
    """

    student: AnausNetwork
    teacher: AnausNetwork

    def __init__(self, shape: AnausShape) -> None:
        super().__init__(AnausNetwork(shape, student=True), AnausNetwork(shape, student=False))
        self.shape = shape
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def norm_buffers(self) -> dict[str, Tensor]:
        """Running statistics of every BatchNorm by name, such as ``student.backbone.bn1.…``."""
        return {
            f"{name}.{part}": buffer
            for name, norm in self._norms()
            for part, buffer in norm.named_buffers()
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """Mean and second moment of every BatchNorm, new tensors; nothing unless shared."""
        found: dict[str, Tensor] = {}
        if not self.shape.share_statistics:
            return found
        for name, norm in self._norms():
            mean, variance = _statistics(norm)
            found[f"{_STATISTICS}{name}.mean"] = mean.clone()
            found[f"{_STATISTICS}{name}.square"] = variance + mean.square()
        return found

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take merged statistics where this model has seen no batch of its own yet.

        A site that trains keeps its own, as SiloBN does (Andreux et al. 2020, arXiv:2008.07424).
        """
        for name, norm in self._norms() if tensors else ():
            if norm.num_batches_tracked is None or int(norm.num_batches_tracked) > 0:
                continue
            mean = tensors[f"{_STATISTICS}{name}.mean"]
            square = tensors[f"{_STATISTICS}{name}.square"]
            held_mean, held_variance = _statistics(norm)
            held_mean.copy_(mean)
            held_variance.copy_((square - mean.square()).clamp_min(0))

    def _norms(self) -> list[tuple[str, nn.modules.batchnorm._BatchNorm]]:
        kind = nn.modules.batchnorm._BatchNorm
        return [(name, each) for name, each in self.named_modules() if isinstance(each, kind)]


def level_of(scale: int, size: int) -> int:
    """Which map has ``scale`` cells a side for views of ``size`` pixels: 0 for p2 ... 3 for c5.

    Raises:
        ShapeError: none has.
    """
    sides = [size // stride for stride in (4, 8, 16, 32)]
    if scale not in sides:
        raise ShapeError(f"no map has {scale} cells a side at {size} pixels. Use one of {sides}.")
    return sides.index(scale)


def _statistics(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ShapeError("a BatchNorm keeps no running statistics. Build it as the shape says.")
    return mean, variance
