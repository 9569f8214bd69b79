"""ANAUS: backbone, regions, overlap, losses, heads and optimiser of the ultrasound cohort.

Source: after the ANAUS paper and its released code; docs/method.md says which is followed where.
"""

from typing import Literal, Self

from pydantic import model_validator

from agssd_core.config.agssd import TeacherConfig
from agssd_core.config.federation import FederationConfig
from agssd_core.config.node import Node, require, within


class BackboneConfig(Node):
    """The 2D ResNet.

    Attributes:
        width: planes of the stem; 64 is torchvision's.
        norm: ``group`` keeps no running statistics, so every site exports the same encoder.
        groups: groups of every GroupNorm.
    """

    depth: Literal[18, 34, 50, 101, 152] = 18
    width: int = 64
    norm: Literal["batch", "group"] = "batch"
    groups: int = 8

    @model_validator(mode="after")
    def _check(self) -> Self:
        uneven = self.norm == "group" and self.groups > 0 and self.width % self.groups
        require(
            [
                within("anaus.backbone.width", self.width, 4, 512),
                within("anaus.backbone.groups", self.groups, 1, 64),
                f"anaus.backbone.width = {self.width} is not a multiple of "
                f"anaus.backbone.groups = {self.groups}. Choose groups that divide the width."
                if uneven
                else "",
            ]
        )
        return self


class RegionsConfig(Node):
    """The anatomies that are pooled.

    Attributes:
        scales: edges of the feature maps, cells; each is augment.size / 32, 16, 8 or 4.
        per_view: K, anatomies sampled of every view.
        sampling: ``coverage`` in proportion to their area, as the paper; ``uniform`` as its code.
    """

    scales: tuple[int, ...] = (7, 14, 28, 56)
    per_view: int = 16
    sampling: Literal["coverage", "uniform"] = "coverage"

    @model_validator(mode="after")
    def _check(self) -> Self:
        rising = all(a < b for a, b in zip(self.scales, self.scales[1:], strict=False))
        require(
            [
                "" if self.scales else "anaus.regions.scales is empty. Name at least one.",
                ""
                if rising
                else f"anaus.regions.scales = {self.scales} must ascend and name none twice.",
                within("anaus.regions.per_view", self.per_view, 1, 255),
            ]
        )
        return self


class OverlapConfig(Node):
    """The overlap of the two views, and how it is damaged for core-region prediction.

    Attributes:
        source: ``view`` cuts it from each augmented view, as the paper's figure; ``image`` from
            the undisturbed frame, as the released code.
        min_share: least overlap, as a share of the smaller view; ``tries`` redraws are made for it.
        shuffle_p, intensity_p, inpaint_p: probability of each kind of damage.
        shuffle_block: edge of a shuffled block at 224 pixels.
        inpaint_boxes: boxes of noise, each drawn with ``inpaint_p``.
    """

    source: Literal["view", "image"] = "view"
    min_share: float = 0.2
    tries: int = 10
    shuffle_p: float = 0.8
    shuffle_block: int = 11
    intensity_p: float = 0.9
    inpaint_p: float = 0.95
    inpaint_boxes: int = 10

    @model_validator(mode="after")
    def _check(self) -> Self:
        shares = ("min_share", "shuffle_p", "intensity_p", "inpaint_p")
        require(
            [
                *(within(f"anaus.overlap.{name}", getattr(self, name), 0, 1) for name in shares),
                within("anaus.overlap.tries", self.tries, 1, 1000),
                within("anaus.overlap.shuffle_block", self.shuffle_block, 1, 256),
                within("anaus.overlap.inpaint_boxes", self.inpaint_boxes, 0, 1000),
            ]
        )
        return self


class UsAugmentConfig(Node):
    """Two views of a grey frame, after BYOL's asymmetric pair.

    Attributes:
        size: edge of a view, pixels; a multiple of 32.
        min_scale, max_scale: share of the frame's area that a view covers.
        jitter: greatest relative change of brightness and of contrast.
        blur_p, solarize_p: probability at the first and at the second view.
        flip_p: probability of a horizontal flip of a view.
    """

    size: int = 224
    min_scale: float = 0.2
    max_scale: float = 1.0
    jitter: float = 0.4
    blur_p: tuple[float, float] = (1.0, 0.1)
    solarize_p: tuple[float, float] = (0.0, 0.2)
    flip_p: float = 0.5

    @model_validator(mode="after")
    def _check(self) -> Self:
        size, low, high = self.size, self.min_scale, self.max_scale
        require(
            [
                within("anaus.augment.size", size, 32, 1024),
                ""
                if size % 32 == 0
                else f"anaus.augment.size = {size} is not a multiple of 32. "
                f"Try {-(-size // 32) * 32}.",
                ""
                if 0.01 <= low <= high <= 1
                else f"anaus.augment.min_scale = {low:g} and max_scale = {high:g} must ascend "
                "within [0.01, 1].",
                within("anaus.augment.jitter", self.jitter, 0, 0.9),
                within("anaus.augment.flip_p", self.flip_p, 0, 1),
                *(within("anaus.augment.blur_p", p, 0, 1) for p in self.blur_p),
                *(within("anaus.augment.solarize_p", p, 0, 1) for p in self.solarize_p),
            ]
        )
        return self


class AnausLossConfig(Node):
    """Weights and forms of the two terms.

    Attributes:
        align: weight of inter-view alignment.
        context: lambda_ctx, weight of core-region prediction.
        temperature: of the alignment's logits, dimensionless.
        drop_same_id: leave the same anatomy of *other* frames out of the negatives.
        context_form: ``squared`` error as published, or ``cosine`` distance.
    """

    align: float = 1.0
    context: float = 1.0
    temperature: float = 0.1
    drop_same_id: bool = False
    context_form: Literal["squared", "cosine"] = "squared"

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                within("anaus.loss.align", self.align, 0, 1000),
                within("anaus.loss.context", self.context, 0, 1000),
                within("anaus.loss.temperature", self.temperature, 0.001, 10),
                ""
                if self.align != 0 or self.context != 0
                else "anaus.loss.align and anaus.loss.context are both 0. Give one a weight.",
            ]
        )
        return self


class AnausHeadConfig(Node):
    """Widths of projector, predictor and feature pyramid."""

    hidden_projector: int = 1024
    projection: int = 256
    hidden_predictor: int = 4096
    fpn: int = 256

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = ("hidden_projector", "projection", "hidden_predictor", "fpn")
        require(within(f"anaus.head.{name}", getattr(self, name), 4, 16384) for name in names)
        return self


class LarsConfig(Node):
    """LARS with warm-up and cosine to 0, over the run's global step.

    ``learning_rate`` None follows 0.3 * B_eff / 256, B_eff being the frames of one step over all
    sites of a round. ``trust`` is LARS's eta, ``warmup`` a share of all steps.
    """

    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-6
    trust: float = 0.001
    warmup: float = 0.01

    @model_validator(mode="after")
    def _check(self) -> Self:
        rate = self.learning_rate
        require(
            [
                within("anaus.optimiser.learning_rate", rate, 1e-9, 100)
                if rate is not None
                else "",
                within("anaus.optimiser.momentum", self.momentum, 0, 0.99999),
                within("anaus.optimiser.weight_decay", self.weight_decay, 0, 10),
                within("anaus.optimiser.trust", self.trust, 1e-6, 1),
                within("anaus.optimiser.warmup", self.warmup, 0, 1),
            ]
        )
        return self


class AnausConfig(Node):
    """The whole method.

    Attributes:
        batch_size: frames per optimiser step of a site.
        labels: which anatomy label maps a site uses; ``auto`` is the best that it has.
        share_statistics: send BatchNorm's statistics too, merged by moments; an export of a
            BatchNorm encoder needs them.
        federation: rounds and rules of this cohort; None is those of the run.
    """

    backbone: BackboneConfig = BackboneConfig()
    regions: RegionsConfig = RegionsConfig()
    overlap: OverlapConfig = OverlapConfig()
    augment: UsAugmentConfig = UsAugmentConfig()
    loss: AnausLossConfig = AnausLossConfig()
    head: AnausHeadConfig = AnausHeadConfig()
    optimiser: LarsConfig = LarsConfig()
    teacher: TeacherConfig = TeacherConfig(ema_momentum=0.99)
    batch_size: int = 32
    labels: Literal["auto", "lpsam", "disk", "superpixels"] = "auto"
    share_statistics: bool = False
    federation: FederationConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        size, scales = self.augment.size, self.regions.scales
        possible = tuple(size // stride for stride in (32, 16, 8, 4))
        require(
            [
                within("anaus.batch_size", self.batch_size, 1, 4096),
                ""
                if set(scales) <= set(possible)
                else f"anaus.regions.scales = {scales} are not maps of a backbone that sees "
                f"anaus.augment.size = {size} pixels. Choose from {possible}.",
                "anaus.share_statistics has no effect with anaus.backbone.norm = group, which "
                "keeps no statistics. Leave it false."
                if self.share_statistics and self.backbone.norm == "group"
                else "",
                *self._uneven_heads(),
            ]
        )
        return self

    def _uneven_heads(self) -> list[str]:
        """GroupNorm of the heads needs widths that its groups divide."""
        groups = self.backbone.groups
        if self.backbone.norm != "group" or groups < 1:
            return []
        return [
            f"anaus.head.{name} = {getattr(self.head, name)} is not a multiple of "
            f"anaus.backbone.groups = {groups}. Choose a multiple."
            for name in ("hidden_projector", "hidden_predictor")
            if getattr(self.head, name) % groups
        ]
