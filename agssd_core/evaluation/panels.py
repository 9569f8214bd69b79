"""The numbers behind the pictures: what one step of training saw of a few volumes.

Views, edges and mask are those of that very step: the functions that the step calls make them
from the same seeds. The networks are as they are now, in ``eval`` mode.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agssd_core.config import AgssdConfig
from agssd_core.config.node import Size3
from agssd_core.data.cache import SiteVolumes
from agssd_core.errors import TrainingError
from agssd_core.evaluation.features import evaluating, joint_colours, token_features
from agssd_core.evaluation.planes import PairPlane, Rectangle, box_on_plane, pair_plane
from agssd_core.losses.reconstruction import patchify
from agssd_core.models.student_teacher import StudentTeacher
from agssd_core.training.distributed import ProcessGroup
from agssd_core.training.hiding import hide_tokens
from agssd_core.views.batch import ViewBatch, make_batch, token_grid
from agssd_core.views.masking import alpha_at, token_voxels
from agssd_core.views.seeds import torch_generator_for

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
_PIXEL_EPSILON = 1e-6


@dataclass(frozen=True)
class StepOfRun:
    """Which step of which run at which site.

    Attributes:
        seed: of the run. site: its name. step: global, from 0. total_steps: G of the plan.
        batch_size: volumes in a step.
    """

    seed: int
    site: str
    step: int
    total_steps: int
    batch_size: int


@dataclass(frozen=True)
class VolumePanels:
    """What is drawn of one volume; planes are (depth, height), pairs are (view 1, view 2).

    Attributes:
        volume_index: of the site's volumes.
        modality: CT or MR. spacing_mm: (depth, height) of ``volume_plane``.
        volume_plane: the whole volume at ``plane.position``.
        local_boxes: outlines of the local crops that the plane cuts.
        overlap: share of the smaller global crop that both show.
        clean, seen: the crops before and after photometric augmentation.
        edges: edge strength in [0, 1].
        hidden: token layer of the plane (g, g), True where hidden.
        hidden_share: over the whole view. alpha: the step's preference for edges.
        prediction: ``clean`` with the prediction at hidden tokens.
        error: absolute error at hidden tokens, NaN elsewhere.
        masked_l1: over all hidden voxels of the view.
        student, teacher: (g, g, 3) colours of the token layer.
        variance_held: by the three components.
    """

    volume_index: int
    modality: str
    spacing_mm: tuple[float, float]
    plane: PairPlane
    volume_plane: FloatArray
    local_boxes: tuple[Rectangle, ...]
    overlap: float
    step: int
    clean: tuple[FloatArray, FloatArray]
    seen: tuple[FloatArray, FloatArray]
    edges: tuple[FloatArray, FloatArray]
    hidden: tuple[BoolArray, BoolArray]
    hidden_share: tuple[float, float]
    alpha: float
    prediction: tuple[FloatArray, FloatArray]
    error: tuple[FloatArray, FloatArray]
    masked_l1: tuple[float, float]
    student: tuple[FloatArray, FloatArray]
    teacher: tuple[FloatArray, FloatArray]
    variance_held: float


@dataclass(frozen=True)
class _Step:
    """One batch with its mask and the student's reconstruction; crops are (2, B, 1, D, H, W)."""

    batch: ViewBatch
    mask: Tensor
    edge: Tensor
    prediction: Tensor
    alpha: float


def step_panels(
    model: StudentTeacher,
    volumes: SiteVolumes,
    *,
    agssd: AgssdConfig,
    at: StepOfRun,
    count: int,
) -> tuple[VolumePanels, ...]:
    """Compute the panels of the first ``count`` different volumes of a step.

    Args:
        model: student and teacher as they are now; their modes are left as found.
        volumes: the site's.
        agssd: the method's settings.
        at: the step whose views and mask are shown.
        count: volumes wanted; fewer when the step holds fewer.

    Raises:
        TrainingError: the model has no decoder.
    """
    batch = make_batch(
        volumes, agssd, seed=at.seed, site=at.site, step=at.step, batch_size=at.batch_size
    )
    step = _replay(model, batch, agssd, at)
    indices = [int(index) for index in batch.volume_index]
    chosen = [place for place, index in enumerate(indices) if index not in indices[:place]]
    return tuple(
        _panels(model, volumes, step, place=place, agssd=agssd, at=at) for place in chosen[:count]
    )


def _replay(model: StudentTeacher, batch: ViewBatch, agssd: AgssdConfig, at: StepOfRun) -> _Step:
    """Draw the step's mask again and let the student reconstruct."""
    decoder = model.student.decoder
    if decoder is None:
        raise TrainingError("the student has no decoder, so nothing is reconstructed. Load one.")
    alpha = alpha_at(agssd.eaam, at.step, at.total_steps)
    hiding = hide_tokens(
        batch,
        agssd,
        alpha=alpha,
        state=model.state,
        generator=torch_generator_for(at.seed, at.site, "masks", at.step),
        group=ProcessGroup(),
    )
    device = next(model.parameters()).device
    mask, grid = hiding.hidden.mask, token_grid(agssd)
    with evaluating(model):
        crops = batch.globals_seen.flatten(0, 1).to(device)
        _, tokens = model.student.encode(crops, mask.flatten(0, 1).to(device))
        voxels = decoder(tokens, grid).float().cpu()
    clean = batch.globals_clean.flatten(0, 1)
    if agssd.loss.norm_pix:
        voxels = _in_units_of(patchify(clean, agssd.model.patch_size), voxels)
    prediction = unpatchify(voxels, grid, agssd.model.patch_size).view_as(batch.globals_clean)
    return _Step(batch, mask, hiding.edge.view_as(batch.globals_clean), prediction, alpha)


def unpatchify(patches: Tensor, grid: Size3, patch_size: int) -> Tensor:
    """Put the voxels of tokens back together: (M, N, p^3) -> (M, 1, D, H, W)."""
    p = patch_size
    cubes = patches.reshape(-1, *grid, p, p, p).permute(0, 1, 4, 2, 5, 3, 6)
    return cubes.reshape(-1, 1, *(side * p for side in grid))


def _in_units_of(target: Tensor, normalised: Tensor) -> Tensor:
    """Undo the normalisation of each patch with the mean and variance of its target."""
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return normalised * torch.sqrt(variance + _PIXEL_EPSILON) + mean


def _panels(
    model: StudentTeacher,
    volumes: SiteVolumes,
    step: _Step,
    *,
    place: int,
    agssd: AgssdConfig,
    at: StepOfRun,
) -> VolumePanels:
    batch, index = step.batch, int(step.batch.volume_index[place])
    info = volumes.infos[index]
    plane = pair_plane(batch.affine_g[:, place].numpy(), agssd.cvac.global_size)
    layers = _Layers(plane, agssd)
    mask = step.mask[:, place]
    features = token_features(model, batch.globals_seen[:, place : place + 1])
    student, teacher, held = joint_colours(features.student[:, 0], features.teacher[:, 0])

    clean, seen = batch.globals_clean[:, place, 0], batch.globals_seen[:, place, 0]
    hidden = token_voxels(mask, grid=layers.grid, patch_size=layers.patch)[:, 0]
    error = (step.prediction[:, place, 0] - clean).abs().masked_fill(~hidden, torch.nan)
    locals_ = (box_on_plane(a, plane.position) for a in batch.affine_l[:, place].numpy())
    return VolumePanels(
        volume_index=index,
        modality=info.modality,
        spacing_mm=(info.spacing_mm[0], info.spacing_mm[1]),
        plane=plane,
        volume_plane=_volume_plane(volumes, index, plane.position),
        local_boxes=tuple(box for box in locals_ if box is not None),
        overlap=float(batch.overlap[place]),
        step=at.step,
        clean=layers.voxels(clean),
        seen=layers.voxels(seen),
        edges=layers.voxels(step.edge[:, place, 0]),
        hidden=layers.tokens(mask.numpy()),
        hidden_share=_pair(mask.float().mean(dim=1)),
        alpha=step.alpha,
        prediction=layers.voxels(torch.where(hidden, step.prediction[:, place, 0], clean)),
        error=layers.voxels(error),
        masked_l1=_pair(error.flatten(1).nanmean(1).nan_to_num()),
        student=layers.tokens(student),
        teacher=layers.tokens(teacher),
        variance_held=held,
    )


@dataclass(frozen=True)
class _Layers:
    """Cuts the plane out of both views' voxels and tokens."""

    plane: PairPlane
    agssd: AgssdConfig

    @property
    def grid(self) -> Size3:
        return token_grid(self.agssd)

    @property
    def patch(self) -> int:
        return self.agssd.model.patch_size

    def voxels(self, views: Tensor) -> tuple[FloatArray, FloatArray]:
        """(2, D, H, W) to two (D, H) planes."""
        first, second = self.plane.slices
        values = views.double().numpy()
        return values[0, :, :, first], values[1, :, :, second]

    def tokens(self, views: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """(2, N, ...) to the layer of tokens that each plane cuts, (g, g, ...)."""
        first, second = (number // self.patch for number in self.plane.slices)
        cubes = views.reshape(2, *self.grid, *views.shape[2:])
        return cubes[0, :, :, first], cubes[1, :, :, second]


def _volume_plane(volumes: SiteVolumes, index: int, position: float) -> FloatArray:
    depth, height, width = volumes.infos[index].shape
    through = int(np.clip(np.floor(position), 0, width - 1))
    plane = volumes.read_crop(index, (0, 0, through), (depth, height, 1))
    return plane[:, :, 0].astype(np.float64)


def _pair(values: Tensor) -> tuple[float, float]:
    return float(values[0]), float(values[1])
