"""The ultrasound backbone: MONAI's 2D ResNet under torchvision's names, with Batch- or GroupNorm.

MONAI 1.6's ``ResNet(norm=...)`` reaches the stem only, so its BatchNorm layers are exchanged
here after it is built. Residuals are added out of place and activations keep their input, as
per-sample gradients need.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from monai.networks.nets.resnet import ResNet, ResNetBlock, ResNetBottleneck
from torch import Tensor, nn

from agssd_core.errors import ShapeError

Depth = Literal[18, 34, 50, 101, 152]
_LAYERS: dict[int, list[int]] = {
    18: [2, 2, 2, 2],
    34: [3, 4, 6, 3],
    50: [3, 4, 6, 3],
    101: [3, 4, 23, 3],
    152: [3, 8, 36, 3],
}
_BOTTLENECK_FROM = 50


@dataclass(frozen=True)
class ResnetShape:
    """What decides the arrays of a backbone.

    Attributes:
        depth: layers, as the family is named.
        width: planes of the stem; 64 is torchvision's.
        norm: ``group`` keeps no running statistics.
        groups: groups of every GroupNorm; divides ``width``.
    """

    depth: Depth = 18
    width: int = 64
    norm: Literal["batch", "group"] = "batch"
    groups: int = 8

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Channels of c2, c3, c4 and c5."""
        expansion = 4 if self.depth >= _BOTTLENECK_FROM else 1
        first = self.width * expansion
        return first, 2 * first, 4 * first, 8 * first


class ResNetBackbone(nn.Module):
    """Feature maps at a quarter, eighth, sixteenth and thirty-second of the frame's side.

    Args:
        shape: what to build; weights are drawn from torch's global generator.

    Raises:
        ShapeError: ``groups`` does not divide ``width``.
    """

    def __init__(self, shape: ResnetShape) -> None:
        super().__init__()
        if shape.norm == "group" and shape.width % shape.groups:
            raise ShapeError(
                f"{shape.groups} groups do not divide a stem of {shape.width} planes. Choose a "
                "divisor for backbone.groups."
            )
        self.shape = shape
        network = _monai_resnet(shape)
        self.conv1, self.bn1, self.maxpool = network.conv1, network.bn1, network.maxpool
        self.act = nn.ReLU()
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Channels of the four maps."""
        return self.shape.channels

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Compute c2 to c5.

        Args:
            frames: (B, 3, H, W), H and W multiples of 32.

        Raises:
            ShapeError: a side is no multiple of 32.
        """
        if frames.shape[-1] % 32 or frames.shape[-2] % 32:
            raise ShapeError(
                f"frames of {tuple(frames.shape[-2:])} pixels do not divide by 32. Crop to a "
                "multiple of 32."
            )
        x = self.maxpool(self.act(self.bn1(self.conv1(frames))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


class _Basic(ResNetBlock):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        kept = x if self.downsample is None else self.downsample(x)
        return self.act(out + kept)  # type: ignore[no-any-return]


class _Bottleneck(ResNetBottleneck):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.act(self.bn2(self.conv2(out)))))
        kept = x if self.downsample is None else self.downsample(x)
        return self.act(out + kept)  # type: ignore[no-any-return]


def monai_arguments(shape: ResnetShape) -> dict[str, Any]:
    """Arguments of ``monai.networks.nets.ResNet`` for this backbone, all but GroupNorm."""
    return {
        "block": "bottleneck" if shape.depth >= _BOTTLENECK_FROM else "basic",
        "layers": _LAYERS[shape.depth],
        "block_inplanes": [shape.width * factor for factor in (1, 2, 4, 8)],
        "spatial_dims": 2,
        "n_input_channels": 3,
        "conv1_t_stride": 2,
        "bias_downsample": False,
        "feed_forward": False,
    }


def _monai_resnet(shape: ResnetShape) -> Any:
    block = _Bottleneck if shape.depth >= _BOTTLENECK_FROM else _Basic
    network = ResNet(**{**monai_arguments(shape), "block": block})
    for module in list(network.modules()):
        if isinstance(module, ResNetBlock | ResNetBottleneck):
            module.act = nn.ReLU()
        if shape.norm == "group":
            _exchange_norms(module, shape.groups)
    return network


def _exchange_norms(module: nn.Module, groups: int) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
