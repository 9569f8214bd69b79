"""Frozen encoders as sources of features: one vector a scan, and maps that cover the image."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from agssd_core.config import RunConfig
from agssd_core.errors import ShapeError
from agssd_core.evaluation import export_resnet, export_vit
from agssd_core.evaluation.cells import frame_size, overlap_weights, volume_cells
from agssd_core.evaluation.export_file import Network
from agssd_core.evaluation.labelled import LabelledArrays
from agssd_core.models.anaus import GREY_MEAN, GREY_STD, AnausShape
from agssd_core.models.fpn import FeaturePyramid
from agssd_core.models.resnet2d import ResNetBackbone
from agssd_core.models.vit3d import VisionTransformer3d
from agssd_core.training.anaus_build import pair_shape
from agssd_core.training.build import model_shape
from agssd_core.training.mixed_precision import EncoderPrecision
from agssd_core.weights import Weights

Reals = NDArray[np.float32]
Precision = Literal["float32", "bf16"]
CROPS_AT_ONCE = 4
Start = tuple[int, int, int]


class FeatureSource(Protocol):
    """What probes ask; the answer for a scan depends on that scan alone."""

    def pooled(self, arrays: LabelledArrays) -> Reals:
        """(F,) features of the whole scan."""
        ...

    def maps(self, arrays: LabelledArrays) -> Reals:
        """(C, d, h, w) or (C, h, w): cells that cover the image evenly, see ``cells``."""
        ...


class VolumeEncoder:
    """AG-SSD's transformer in sliding crops of its global size that overlap by half.

    Crops at the border are shifted inwards; a volume smaller than a crop is padded with its
    outermost voxels. A map has one cell for about one patch: a cell is the mean of all tokens of
    all crops, weighted by the volume that each shares with it.

    Args:
        network: with loaded weights.
        device: where it runs.
        precision: ``bf16`` autocasts.
    """

    def __init__(
        self,
        network: VisionTransformer3d,
        *,
        device: str | torch.device = "cpu",
        precision: Precision = "float32",
    ) -> None:
        self._network = network.to(device).eval()
        self._device, self._precision = torch.device(device), precision

    def pooled(self, arrays: LabelledArrays) -> Reals:
        """(2 E,): cls token, then mean patch token, both the mean over crops that show body."""
        crops = [
            (body.any(), cls, tokens.mean(axis=0)) for body, cls, tokens in self._crops(arrays)
        ]
        chosen = [crop for crop in crops if crop[0]] or crops
        means = [np.mean([crop[part] for crop in chosen], axis=0) for part in (1, 2)]
        return np.concatenate(means).astype(np.float32)

    def maps(self, arrays: LabelledArrays) -> Reals:
        """(E, d, h, w) with d = D / patch size, rounded up, and so on."""
        shape, kind = arrays.image.shape, self._network.shape
        cells = volume_cells(shape, kind.patch_size)
        total = np.zeros((*cells, kind.width), dtype=np.float64)
        mass = np.zeros(cells, dtype=np.float64)
        starts = crop_starts(shape, kind.image_size)
        for start, (_, _, tokens) in zip(starts, self._crops(arrays), strict=True):
            weights = [
                overlap_weights(side, count, _intervals(first, own, kind.patch_size))
                for side, count, first, own in zip(shape, cells, start, kind.grid, strict=True)
            ]
            # A crop reaches few of the cells; adding its zeros to all others took most of the time.
            (a, b, c), window = _touched(weights)
            grid = tokens.reshape(*kind.grid, kind.width)
            part = np.einsum("ai,ijke->ajke", a, grid)
            part = np.einsum("bj,ajke->abke", b, part)
            total[window] += np.einsum("ck,abke->abce", c, part)
            mass[window] += np.einsum("a,b,c->abc", a.sum(1), b.sum(1), c.sum(1))
        return np.moveaxis(total / mass[..., None], -1, 0).astype(np.float32)

    def _crops(self, arrays: LabelledArrays) -> Iterator[tuple[NDArray[np.bool_], Reals, Reals]]:
        """Body, cls token (E,) and patch tokens (N, E) of every crop, in the order of starts."""
        _require(arrays, 3, "CT and MR")
        size = self._network.shape.image_size
        missing = [(0, max(0, s - side)) for s, side in zip(size, arrays.image.shape, strict=True)]
        image = np.pad(arrays.image, missing, mode="edge")
        inside = np.pad(arrays.inside, missing)
        places = [
            tuple(slice(first, first + side) for first, side in zip(start, size, strict=True))
            for start in crop_starts(arrays.image.shape, size)
        ]
        for first in range(0, len(places), CROPS_AT_ONCE):
            some = places[first : first + CROPS_AT_ONCE]
            crops = torch.from_numpy(np.stack([image[place] for place in some]))[:, None]
            with torch.no_grad(), EncoderPrecision(self._device, bf16=self._precision == "bf16"):
                cls, tokens = self._network.forward_features(crops.to(self._device))
            found = zip(some, _numpy(cls), _numpy(tokens), strict=True)
            yield from ((inside[place], one, patches) for place, one, patches in found)


class FrameEncoder:
    """ANAUS's ResNet and pyramid on a whole frame, resized as pre-training resizes crops.

    The longer side becomes about ``size`` pixels, both sides multiples of 32, so the maps cover
    the frame exactly.

    Args:
        backbone, pyramid: with loaded weights and running statistics.
        size: edge of a pre-training crop, pixels.
        device: where they run.
        precision: ``bf16`` autocasts.
    """

    def __init__(
        self,
        backbone: ResNetBackbone,
        pyramid: FeaturePyramid,
        *,
        size: int,
        device: str | torch.device = "cpu",
        precision: Precision = "float32",
    ) -> None:
        self._networks = nn.ModuleList([backbone, pyramid]).to(device).eval()
        self._backbone, self._pyramid, self._size = backbone, pyramid, size
        self._device, self._precision = torch.device(device), precision

    def pooled(self, arrays: LabelledArrays) -> Reals:
        """Means of c5 and of p2 over the frame, one after the other."""
        levels = self._levels(arrays)
        means = [level.float().mean(dim=(2, 3)) for level in (levels[-1], levels[0])]
        return _numpy(torch.cat(means, dim=1)[0])

    def maps(self, arrays: LabelledArrays) -> Reals:
        """(C, h, w): p2, p3, p4 and c5 side by side, on p2's grid of 4 x 4 resized pixels."""
        levels = self._levels(arrays)
        size = levels[0].shape[2:]
        grown = [
            functional.interpolate(level.float(), size, mode="bilinear", align_corners=False)
            for level in levels
        ]
        return _numpy(torch.cat(grown, dim=1)[0])

    def _levels(self, arrays: LabelledArrays) -> list[Tensor]:
        _require(arrays, 2, "ultrasound")
        frame = torch.from_numpy(arrays.image)[None, None]
        size = frame_size(arrays.image.shape, self._size)
        grey = functional.interpolate(frame, size, mode="bicubic", antialias=True).clamp_(0, 1)
        mean, std = (torch.tensor(each)[:, None, None] for each in (GREY_MEAN, GREY_STD))
        colours = ((grey - mean) / std).to(self._device)
        with torch.no_grad(), EncoderPrecision(self._device, bf16=self._precision == "bf16"):
            return self._pyramid(self._backbone(colours))  # type: ignore[no-any-return]


def open_encoder(
    weights: Weights,
    config: RunConfig,
    *,
    network: Network = "teacher",
    device: str | torch.device = "cpu",
    precision: Precision = "float32",
    statistics: Weights | None = None,
) -> FeatureSource:
    """The frozen encoder of a checkpoint; ``config.federation.cohort`` says of which method.

    Args:
        weights: a checkpoint's arrays.
        config: that it was trained with.
        network: which of the pair.
        device: where it runs.
        precision: of the encoder's pass.
        statistics: a site's own running statistics, for ultrasound with BatchNorm; without them
            the merged ones are used.

    Raises:
        WeightsError: the checkpoint holds no such network, or one of another shape.
        CheckpointError: a BatchNorm encoder has no running statistics.
    """
    if config.federation.cohort != "us":
        vit = model_shape(config.agssd).vit
        encoder = VisionTransformer3d(vit)
        encoder.load_state_dict(export_vit.encoder_tensors(weights, vit, network=network))
        return VolumeEncoder(encoder, device=device, precision=precision)
    shape = pair_shape(config.anaus)
    backbone, pyramid = _frame_networks(shape, weights, network, statistics)
    return FrameEncoder(
        backbone, pyramid, size=config.anaus.augment.size, device=device, precision=precision
    )


def crop_starts(shape: tuple[int, ...], size: Start) -> list[Start]:
    """First voxels of crops that cover a volume, half a crop apart; the last ends at the border."""
    axes = []
    for side, crop in zip(shape, size, strict=True):
        last = max(0, side - crop)
        axes.append([*range(0, last, max(1, crop // 2)), last])
    return [(d, h, w) for d, h, w in product(*axes)]


def _frame_networks(
    shape: AnausShape, weights: Weights, network: Network, statistics: Weights | None
) -> tuple[ResNetBackbone, FeaturePyramid]:
    tensors, _ = export_resnet.encoder_tensors(
        weights, shape, network=network, statistics=statistics
    )
    backbone = ResNetBackbone(shape.backbone)
    pyramid = FeaturePyramid(backbone.channels, shape.fpn)
    for name, module in (("backbone.", backbone), ("pyramid.", pyramid)):
        own = {n.removeprefix(name): t for n, t in tensors.items() if n.startswith(name)}
        module.load_state_dict(own)
    return backbone, pyramid


def _touched(
    weights: Sequence[NDArray[np.float64]],
) -> tuple[list[NDArray[np.float64]], tuple[slice, ...]]:
    """The rows of each axis' weights that are not all zero, and where they lie."""
    window = []
    for each in weights:
        rows = np.flatnonzero(each.any(axis=1))
        window.append(slice(int(rows[0]), int(rows[-1]) + 1))
    return [each[place] for each, place in zip(weights, window, strict=True)], tuple(window)


def _intervals(first: int, count: int, patch: int) -> NDArray[np.float64]:
    starts = first + patch * np.arange(count, dtype=np.float64)
    return np.stack([starts, starts + patch], axis=1)


def _numpy(tensor: Tensor) -> Reals:
    return np.asarray(tensor.float().cpu().numpy())


def _require(arrays: LabelledArrays, axes: int, what: str) -> None:
    if arrays.image.ndim != axes:
        raise ShapeError(
            f"an encoder of {what} was given an image with {arrays.image.ndim} axes. Name its "
            "modalities in the task."
        )
