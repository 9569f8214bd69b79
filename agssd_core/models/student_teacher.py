"""Student, teacher and their running state, and how they become named arrays."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from agssd_core.models.cross_view import CrossViewAttention, GeomBias
from agssd_core.models.decoders import DroppedTokenPredictor, LinearDecoder, TransformerDecoder
from agssd_core.models.heads import AlignPredictor, DistillationHead
from agssd_core.models.pair import NetworkPair
from agssd_core.models.vit3d import VisionTransformer3d, VitShape

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


class StudentTeacher(NetworkPair):
    """The pair that is trained and merged; the teacher stays in ``eval`` mode."""

    student: AgssdNetwork
    teacher: AgssdNetwork

    def __init__(self, shape: AgssdShape) -> None:
        super().__init__(
            AgssdNetwork(shape, student=True), AgssdNetwork(shape, student=False).eval()
        )
        self.shape = shape
        self.state = ModelState(shape.vit.width, shape.prototypes)

    def train(self, mode: bool = True) -> "StudentTeacher":
        """Set the student's mode; the teacher stays in ``eval``."""
        super().train(mode)
        self.teacher.eval()
        return self

    def state_tensors(self) -> dict[str, Tensor]:
        """The running statistics, sharing the model's memory."""
        return dict(self.state.named_buffers())


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
