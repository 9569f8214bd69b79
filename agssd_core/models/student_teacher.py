"""Student, teacher and their running state, and how they become named arrays."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from agssd_core.models.cross_view import CrossViewAttention, GeomBias
from agssd_core.models.decoders import DroppedTokenPredictor, LinearDecoder, TransformerDecoder
from agssd_core.models.heads import AlignPredictor, DistillationHead
from agssd_core.models.vit3d import VisionTransformer3d, VitShape
from agssd_core.weights import ArraySpec, Schema, Weights, require_schema

_TOKEN_MODULES = ("mask_token", "cls_token", "pos_embed")


@dataclass(frozen=True)
class AgssdShape:
    """Everything that fixes the model's arrays.

    Attributes:
        vit: the encoder.
        prototypes: K. hidden: H. bottleneck: d_b of the distillation heads.
        shared_head: one head for cls and patch tokens.
        cvaa: ``fuse`` builds the cross-view attention, ``align`` the predictor, ``off`` neither.
        geom_bias: of the cross-view attention.
        decoder: reconstruction head. masking: ``drop`` adds the predictor of dropped tokens.
    """

    vit: VitShape
    prototypes: int
    hidden: int
    bottleneck: int
    shared_head: bool = False
    cvaa: Literal["fuse", "align", "off"] = "fuse"
    geom_bias: GeomBias = "soft"
    decoder: Literal["linear", "transformer"] = "linear"
    masking: Literal["replace", "drop"] = "replace"


class AgssdNetwork(nn.Module):
    """Encoder, heads and cross-view attention; a student also has what only it needs.

    Attributes:
        cvaa: None unless ``shape.cvaa`` is ``fuse``.
        head_patch: the same module as ``head_cls`` when the head is shared.
        decoder, align, predictor: None in a teacher; the last two also where not used.
    """

    def __init__(self, shape: AgssdShape, *, student: bool) -> None:
        super().__init__()
        vit, width = shape.vit, shape.vit.width
        self.shape = shape
        self.encoder = VisionTransformer3d(vit)
        self.cvaa = (
            CrossViewAttention(width, vit.heads, geom_bias=shape.geom_bias)
            if shape.cvaa == "fuse"
            else None
        )
        self.head_cls = _head(shape)
        self.head_patch = self.head_cls if shape.shared_head else _head(shape)
        self.decoder = _decoder(shape) if student else None
        self.align = AlignPredictor(width) if student and shape.cvaa == "align" else None
        self.predictor = (
            DroppedTokenPredictor(width, vit.heads) if student and shape.masking == "drop" else None
        )

    def encode(
        self,
        crops: Tensor,
        mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of crops, hidden ones recovered the way ``masking`` says.

        Args:
            crops: (M, 1, D, H, W) in [0, 1].
            mask: (M, N) bool, True where hidden; None hides nothing.
            generator: CPU generator of stochastic depth (training mode only).

        Returns:
            cls token (M, E), patch tokens (M, N, E).
        """
        if self.predictor is None or mask is None:
            return self.encoder.forward_features(crops, mask, generator=generator)
        cls, visible = self.encoder.forward_visible(crops, mask, generator=generator)
        queries = self.encoder.mask_queries(mask, self.encoder.grid_of(crops))
        return cls, self.predictor(queries, visible, mask)

    def prototype_parameters(self) -> list[nn.Parameter]:
        """The prototypes of the heads, each once."""
        heads = {id(head): head for head in (self.head_cls, self.head_patch)}
        return [head.prototypes.weight for head in heads.values()]


class ModelState(nn.Module):
    """Running statistics, as buffers: merged linearly across sites, never trained.

    Attributes:
        centre_cls, centre_patch: (K,) centres of teacher logits.
        density_mean, density_std: (1,) edge density of the scans seen.
        cls_mean, cls_var: (E,) moments of teacher cls tokens.
    """

    centre_cls: Tensor
    centre_patch: Tensor
    density_mean: Tensor
    density_std: Tensor
    cls_mean: Tensor
    cls_var: Tensor

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("centre_cls", torch.zeros(prototypes))
        self.register_buffer("centre_patch", torch.zeros(prototypes))
        # One element, not none: NumPy makes a 0-d array 1-d on its way through a file.
        self.register_buffer("density_mean", torch.zeros(1))
        # 0 means that nothing has been seen yet (views.masking.updated_density).
        self.register_buffer("density_std", torch.zeros(1))
        self.register_buffer("cls_mean", torch.zeros(width))
        self.register_buffer("cls_var", torch.ones(width))


class StudentTeacher(nn.Module):
    """The pair that is trained and merged.

    The teacher starts as a copy of the student, never has gradients and stays in ``eval`` mode.
    """

    def __init__(self, shape: AgssdShape) -> None:
        super().__init__()
        self.shape = shape
        self.student = AgssdNetwork(shape, student=True)
        self.teacher = AgssdNetwork(shape, student=False).eval()
        self.teacher.requires_grad_(requires_grad=False)
        self.state = ModelState(shape.vit.width, shape.prototypes)
        self.update_teacher(ema_momentum=0.0)

    def train(self, mode: bool = True) -> "StudentTeacher":
        """Set the student's mode; the teacher stays in ``eval``."""
        super().train(mode)
        self.teacher.eval()
        return self

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

    def shared_tensors(self, *, include_teacher: bool = True) -> dict[str, Tensor]:
        """What is saved and federated, by its full name, sharing the model's memory.

        Shared heads appear once; fixed position embeddings do not appear.
        """
        groups: dict[str, nn.Module] = {"student": self.student}
        if include_teacher:
            groups["teacher"] = self.teacher
        named: dict[str, Tensor] = {
            f"{group}/{name}": parameter.detach()
            for group, network in groups.items()
            for name, parameter in network.named_parameters()
        }
        return named | {f"state/{name}": buffer for name, buffer in self.state.named_buffers()}

    def shared_schema(self, *, include_teacher: bool = True) -> Schema:
        """Names, shapes and dtypes of ``shared_weights``, sorted by name."""
        tensors = self.shared_tensors(include_teacher=include_teacher)
        return tuple(
            ArraySpec(name, tuple(tensors[name].shape), "float32") for name in sorted(tensors)
        )

    def shared_weights(self, *, include_teacher: bool = True) -> Weights:
        """Copies of ``shared_tensors`` as float32 NumPy arrays."""
        tensors = self.shared_tensors(include_teacher=include_teacher)
        return {
            name: np.array(tensor.cpu().numpy(), dtype=np.float32, copy=True)
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
        for name, tensor in self.shared_tensors(include_teacher=include_teacher).items():
            tensor.copy_(torch.from_numpy(np.array(weights[name])))


def takes_weight_decay(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to biases, norms, tokens, positions or gates."""
    return parameter.ndim > 1 and not any(part in _TOKEN_MODULES for part in name.split("."))


def _head(shape: AgssdShape) -> DistillationHead:
    return DistillationHead(
        shape.vit.width,
        hidden=shape.hidden,
        bottleneck=shape.bottleneck,
        prototypes=shape.prototypes,
    )


def _decoder(shape: AgssdShape) -> LinearDecoder | TransformerDecoder:
    if shape.decoder == "linear":
        return LinearDecoder(shape.vit.width, shape.vit.patch_size)
    return TransformerDecoder(shape.vit.width, shape.vit.patch_size, shape.vit.grid)
