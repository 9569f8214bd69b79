"""Networks that are fine-tuned: MONAI's ViT and ResNet with heads for classes and structures.

This file needs nothing but torch and MONAI: a bundle carries a copy of it.

The transformer keeps its cls token, which MONAI's own UNETR does not, so that every token is what
it was in pre-training. UNETR's ladder has as many rungs as the patch size has halvings; for 12
blocks and patches of 16 it is MONAI's, layer for layer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from monai.networks.nets import ResNet, ViT
from torch import Tensor, nn
from torch.nn import functional

GREY_MEAN, GREY_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NORM = "instance"


class VitEncoder(nn.Module):
    """A plain MONAI ViT with a cls token.

    Args:
        arguments: of ``monai.networks.nets.ViT``. A fixed table of positions (``sincos``) is not
            computed here: it comes with the weights.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        network = ViT(**{**arguments, "pos_embed_type": "learnable"})
        self.patch_embedding, self.blocks = network.patch_embedding, network.blocks
        self.norm, self.cls_token = network.norm, network.cls_token
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        learns = arguments["pos_embed_type"] == "learnable"
        self.patch_embedding.position_embeddings.requires_grad_(requires_grad=learns)
        for block in self.blocks:
            # MONAI builds it in every block and uses it in none of ours.
            block.norm_cross_attn.requires_grad_(requires_grad=False)

    def forward(self, crops: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode crops.

        Args:
            crops: (B, 1, D, H, W) of the native size, in [0, 1].

        Returns:
            (B, 1 + N, E) cls token, then patch tokens after the last norm; and the same of every
            block before it.
        """
        tokens = self.patch_embedding(crops)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        hidden = []
        for block in self.blocks:
            tokens = block(tokens)
            hidden.append(tokens)
        return self.norm(tokens), hidden


class Unetr(nn.Module):
    """Structures of a crop.

    Args:
        vit: arguments of the encoder.
        classes: background included.
        feature_size: channels of the finest map.

    Source:
        Hatamizadeh et al. 2022, arXiv:2103.10504.
    """

    def __init__(self, vit: Mapping[str, Any], classes: int, feature_size: int = 16) -> None:
        super().__init__()
        self.encoder = VitEncoder(vit)
        patch, width, depth = vit["patch_size"][0], vit["hidden_size"], vit["num_layers"]
        self.grid = [side // patch for side in vit["img_size"]]
        self.rungs = patch.bit_length() - 1
        self.taps = [depth * step // self.rungs for step in range(1, self.rungs)]
        channels = [feature_size * 2**rung for rung in range(self.rungs)]
        options: dict[str, Any] = {"kernel_size": 3, "norm_name": _NORM, "res_block": True}
        self.fine = UnetrBasicBlock(3, 1, feature_size, stride=1, **options)
        self.skips = nn.ModuleList(
            UnetrPrUpBlock(
                3,
                width,
                channels[rung],
                num_layer=self.rungs - rung - 1,
                stride=1,
                upsample_kernel_size=2,
                conv_block=True,
                **options,
            )
            for rung in range(1, self.rungs)
        )
        above = [*channels[1:], width]
        self.ups = nn.ModuleList(
            UnetrUpBlock(3, above[rung], channels[rung], upsample_kernel_size=2, **options)
            for rung in range(self.rungs)
        )
        self.out = UnetOutBlock(3, feature_size, classes)

    def forward(self, crops: Tensor) -> Tensor:
        """(B, 1, D, H, W) in [0, 1] -> (B, classes, D, H, W) logits."""
        tokens, hidden = self.encoder(crops)
        finest = [side * 2**self.rungs for side in self.grid]
        skips = [self.fine(_resized(crops, finest))]
        for tap, skip in zip(self.taps, self.skips, strict=True):
            skips.append(skip(self._map(hidden[tap])))
        found = self._map(tokens)
        for up, skip in zip(reversed(self.ups), reversed(skips), strict=True):
            found = up(found, skip)
        return _resized(self.out(found), crops.shape[2:])

    def _map(self, tokens: Tensor) -> Tensor:
        cells = tokens[:, 1:].transpose(1, 2)
        return cells.reshape(*cells.shape[:2], *self.grid)


class VitClassifier(nn.Module):
    """Classes of a crop, from its cls token and mean patch token.

    Args:
        vit: arguments of the encoder.
        classes: their number.
    """

    def __init__(self, vit: Mapping[str, Any], classes: int) -> None:
        super().__init__()
        self.encoder = VitEncoder(vit)
        self.head = nn.Linear(2 * vit["hidden_size"], classes)

    def forward(self, crops: Tensor) -> Tensor:
        """(B, 1, D, H, W) in [0, 1] -> (B, classes) logits."""
        tokens, _ = self.encoder(crops)
        return cast(Tensor, self.head(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)))


class ResnetEncoder(nn.Module):
    """A 2D MONAI ResNet on grey frames.

    Args:
        arguments: of ``monai.networks.nets.ResNet``.
        groups: of GroupNorm in place of BatchNorm; 0 keeps BatchNorm.
    """

    grey_mean: Tensor
    grey_std: Tensor

    def __init__(self, arguments: Mapping[str, Any], groups: int = 0) -> None:
        super().__init__()
        self.backbone = ResNet(**arguments)
        for parent in list(self.backbone.modules()):
            for name, child in list(parent.named_children()):
                if groups and isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, nn.GroupNorm(groups, child.num_features))
        self.register_buffer("grey_mean", torch.tensor(GREY_MEAN)[:, None, None], persistent=False)
        self.register_buffer("grey_std", torch.tensor(GREY_STD)[:, None, None], persistent=False)

    def forward(self, frames: Tensor) -> list[Tensor]:
        """(B, 1, H, W) in [0, 1], sides multiples of 32 -> c2, c3, c4 and c5."""
        network = self.backbone
        found = network.bn1(network.conv1((frames - self.grey_mean) / self.grey_std))
        found = network.maxpool(network.act(found))
        maps = []
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            found = layer(found)
            maps.append(found)
        return maps


class Pyramid(nn.Module):
    """The linear feature pyramid of pre-training, with c5 brought to its width.

    Args:
        channels: of c2 to c5.
        width: of every map that it gives.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(each, width, 1) for each in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels[:-1])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """c2 to c5 -> p2, p3, p4 and p5."""
        down = self.lateral[-1](maps[-1])
        found = [down]
        for level in (2, 1, 0):
            doubled = functional.interpolate(down, scale_factor=2.0, mode="nearest")
            down = self.lateral[level](maps[level]) + doubled
            found.append(self.smooth[level](down))
        return found[::-1]


class FpnSegmenter(nn.Module):
    """Structures of a frame: every map of the pyramid brought to p2's size, then summed.

    Args:
        resnet: arguments of the encoder.
        groups: of its GroupNorm, or 0.
        channels: of c2 to c5.
        width: of the pyramid.
        classes: background included.

    Source:
        Kirillov et al. 2019, arXiv:1901.02446, with one step of convolution for each map.
    """

    def __init__(
        self,
        resnet: Mapping[str, Any],
        groups: int,
        channels: Sequence[int],
        width: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.encoder = ResnetEncoder(resnet, groups)
        self.pyramid = Pyramid(channels, width)
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.GroupNorm(next(g for g in (8, 4, 2, 1) if width % g == 0), width),
                nn.ReLU(),
            )
            for _ in channels
        )
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, 1, H, W) in [0, 1], sides multiples of 32 -> (B, classes, H, W) logits."""
        maps = self.pyramid(self.encoder(frames))
        parts = [
            _resized(level(each), maps[0].shape[2:])
            for level, each in zip(self.levels, maps, strict=True)
        ]
        return _resized(self.out(torch.stack(parts).sum(0)), frames.shape[2:])


class ResnetClassifier(nn.Module):
    """Classes of a frame, from the mean of c5.

    Args:
        resnet: arguments of the encoder.
        groups: of its GroupNorm, or 0.
        width: channels of c5.
        classes: their number.
    """

    def __init__(self, resnet: Mapping[str, Any], groups: int, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = ResnetEncoder(resnet, groups)
        self.head = nn.Linear(width, classes)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, 1, H, W) in [0, 1], sides multiples of 32 -> (B, classes) logits."""
        return cast(Tensor, self.head(self.encoder(frames)[-1].mean((2, 3))))


NETWORKS: Mapping[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (Unetr, VitClassifier, FpnSegmenter, ResnetClassifier)
}


def load_network(network: nn.Module, file: str | Path, device: torch.device | str) -> nn.Module:
    """Fill a network from a state dict in which nothing but tensors is allowed.

    Args:
        network: built with the arguments that the state dict is of.
        file: written with ``torch.save``.
        device: where it shall run.
    """
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.to(device).eval()


def _resized(values: Tensor, size: Sequence[int]) -> Tensor:
    """Linear interpolation, where the size differs."""
    if list(values.shape[2:]) == list(size):
        return values
    mode = "trilinear" if values.dim() == 5 else "bilinear"
    return functional.interpolate(values, size=list(size), mode=mode, align_corners=False)
