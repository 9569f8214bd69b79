"""AG-SSD: model, objective and teacher, with the defaults of the small preset.

Source: after Yu & Dai 2026, doi 10.1109/TMI.2026.3680920 (abstract); values as docs/method.md says.
"""

import math
from typing import Literal, Self

from pydantic import model_validator

from agssd_core.config.node import Node, ordered, require, within
from agssd_core.config.views import AugmentConfig, CvacConfig, EaamConfig


class CvaaConfig(Node):
    """Cross-view attention: ``fuse`` acts inside the patch loss, ``align`` as a fourth loss."""

    mode: Literal["fuse", "align", "off"] = "fuse"
    beta: float = 0.5
    beta_start: float = 0.05
    beta_end: float = 0.15
    geom_bias: Literal["soft", "none", "hard"] = "soft"
    kv_source: Literal["teacher", "student"] = "teacher"
    p_drop: float = 0.0
    min_inner: int = 8

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                within("cvaa.beta", self.beta, 0, 0.5),
                ordered("cvaa.beta_start/beta_end", (self.beta_start, self.beta_end), 0, 1),
                within("cvaa.p_drop", self.p_drop, 0, 1),
                within("cvaa.min_inner", self.min_inner, 1, 4096),
            ]
        )
        return self


class LossConfig(Node):
    """Weights of the three terms, and of optional ones that are off by default."""

    patch: float = 0.1
    cls: float = 0.1
    rec: float = 1.0
    align: float = 0.0
    attn_sup: float = 0.0
    koleo: float = 0.0
    variance: float = 0.0
    norm_pix: bool = False
    edge_weight: float = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = ("patch", "cls", "rec", "align", "attn_sup", "koleo", "variance", "edge_weight")
        require(
            [
                *(within(f"loss.{name}", getattr(self, name), 0, 1000) for name in names),
                ""
                if self.patch + self.cls + self.rec + self.align > 0
                else "loss.patch, loss.cls and loss.rec are all 0. Give at least one a weight.",
            ]
        )
        return self


class HeadConfig(Node):
    """Distillation heads. ``auto`` follows the batch: under 16 views ``ema``/``volume``."""

    shared: bool = False
    prototypes: int = 4096
    hidden: int = 2048
    bottleneck: int = 256
    input_norm_cls: Literal["auto", "batch", "ema", "none"] = "auto"
    input_norm_patch: Literal["auto", "batch", "volume", "none"] = "auto"
    freeze: float = 0.01

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                within("head.prototypes", self.prototypes, 8, 131072),
                within("head.hidden", self.hidden, 8, 16384),
                within("head.bottleneck", self.bottleneck, 8, 4096),
                within("head.freeze", self.freeze, 0, 1),
            ]
        )
        return self


class TargetConfig(Node):
    """Centring and sharpening of teacher logits.

    ``auto`` is ``center`` for both heads; ``volume`` centres over one volume's own tokens.
    ``teacher_temperature_ramp`` is the share of steps over which the temperature goes from
    ``teacher_temperature`` to ``teacher_temperature_end``.
    """

    cls: Literal["auto", "center", "sinkhorn", "none"] = "auto"
    patch: Literal["auto", "center", "sinkhorn", "volume", "none"] = "auto"
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    teacher_temperature_end: float = 0.04
    teacher_temperature_ramp: float = 0.3
    centre_momentum: float = 0.9
    sinkhorn_iterations: int = 3

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = ("student_temperature", "teacher_temperature", "teacher_temperature_end")
        require(
            [
                *(within(f"target.{name}", getattr(self, name), 0.001, 10) for name in names),
                within("target.teacher_temperature_ramp", self.teacher_temperature_ramp, 0, 1),
                within("target.centre_momentum", self.centre_momentum, 0, 1),
                within("target.sinkhorn_iterations", self.sinkhorn_iterations, 1, 100),
            ]
        )
        return self


class ModelConfig(Node):
    """The 3D vision transformer and the reconstruction head."""

    patch_size: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    pos_embed: Literal["learnable", "sincos"] = "learnable"
    drop_path: float = 0.1
    decoder: Literal["linear", "transformer"] = "linear"
    masking: Literal["replace", "drop"] = "replace"

    @model_validator(mode="after")
    def _check(self) -> Self:
        width = self.width
        require(
            [
                ""
                if width % self.heads == 0 and width % 6 == 0
                else f"model.width = {width} must be a multiple of 6 and of model.heads = "
                f"{self.heads}. Try {-(-width // (6 * self.heads)) * 6 * self.heads}.",
                within("model.patch_size", self.patch_size, 2, 32),
                within("model.depth", self.depth, 1, 48),
                within("model.heads", self.heads, 1, 32),
                within("model.mlp_ratio", self.mlp_ratio, 0.5, 8),
                within("model.drop_path", self.drop_path, 0, 0.9),
            ]
        )
        return self


class TeacherConfig(Node):
    """EMA of the student: momentum rises as a cosine over all steps of the run."""

    ema_momentum: float = 0.996
    ema_momentum_end: float = 1.0

    def momentum_at(self, step: int, total_steps: int) -> float:
        """EMA momentum at a global step; here so that sites and server use one formula."""
        done = min(1.0, step / max(1, total_steps))
        span = self.ema_momentum - self.ema_momentum_end
        return self.ema_momentum_end + 0.5 * span * (1 + math.cos(math.pi * done))

    def momentum_product(self, first_step: int, steps: int, total_steps: int) -> float:
        """M_r, the product of a round's momenta, with which a server rebuilds a teacher (T2)."""
        round_steps = range(first_step, first_step + steps)
        return math.prod(self.momentum_at(step, total_steps) for step in round_steps)

    @model_validator(mode="after")
    def _check(self) -> Self:
        pair = (self.ema_momentum, self.ema_momentum_end)
        require([ordered("teacher.ema_momentum/ema_momentum_end", pair, 0, 1)])
        return self


class AgssdConfig(Node):
    """The whole method."""

    model: ModelConfig = ModelConfig()
    cvac: CvacConfig = CvacConfig()
    augment: AugmentConfig = AugmentConfig()
    eaam: EaamConfig = EaamConfig()
    cvaa: CvaaConfig = CvaaConfig()
    loss: LossConfig = LossConfig()
    head: HeadConfig = HeadConfig()
    target: TargetConfig = TargetConfig()
    teacher: TeacherConfig = TeacherConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        require([*self._crop_problems(), *self._target_problems(), *self._loss_problems()])
        return self

    def _crop_problems(self) -> list[str]:
        patch = self.model.patch_size
        found = []
        for name in ("global_size", "local_size"):
            size = getattr(self.cvac, name)
            if any(side <= 0 or side % patch for side in size):
                nearest = tuple(max(1, -(-side // patch)) * patch for side in size)
                found.append(
                    f"cvac.{name} = {size} is not a multiple of model.patch_size = {patch} on "
                    f"every side. Try {nearest}."
                )
        if any(side // patch % self.eaam.unit for side in self.cvac.global_size):
            found.append(
                f"eaam.unit = {self.eaam.unit} does not divide the token grid of "
                f"cvac.global_size = {self.cvac.global_size}. Use eaam.unit = 1."
            )
        if len(set(self.cvac.global_size)) > 1 and self.model.pos_embed == "sincos":
            found.append("model.pos_embed = sincos needs a cubic cvac.global_size. Use learnable.")
        return found

    def _target_problems(self) -> list[str]:
        found = []
        for head in ("cls", "patch"):
            target, norm = getattr(self.target, head), getattr(self.head, f"input_norm_{head}")
            if target == "sinkhorn" and norm == "none":
                found.append(
                    f"target.{head} = sinkhorn collapses without head.input_norm_{head}. "
                    "Set it to batch, or target to center."
                )
        if self.head.shared and self.head.input_norm_cls == "none" != self.head.input_norm_patch:
            found.append("head.shared needs input_norm on both heads or on neither.")
        return found

    def _loss_problems(self) -> list[str]:
        found = []
        if self.cvaa.mode == "align" and self.loss.align == 0:
            found.append(
                "cvaa.mode = align has no effect while loss.align = 0. Set loss.align = 1."
            )
        if self.loss.align > 0 and self.cvaa.mode != "align":
            found.append("loss.align needs cvaa.mode = align. Set it, or loss.align = 0.")
        if self.loss.attn_sup > 0 and self.cvaa.mode != "fuse":
            found.append("loss.attn_sup needs cvaa.mode = fuse. Set it, or loss.attn_sup = 0.")
        if self.model.masking == "drop" and self.eaam.mask_prob < 1:
            found.append("model.masking = drop needs eaam.mask_prob = 1 (equal counts per batch).")
        return found
