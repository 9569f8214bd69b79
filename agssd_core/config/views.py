"""AG-SSD's views: crops, augmentation and masks, with the defaults of the small preset.

Source: after Yu & Dai 2026, doi 10.1109/TMI.2026.3680920 (abstract); values as docs/method.md says.
"""

from typing import Literal, Self

from pydantic import model_validator

from agssd_core.config.node import Node, Range2, Size3, ordered, require, within


class CvacConfig(Node):
    """Overlap-aware crops. Sizes are (depth, height, width) in voxels.

    Attributes:
        enabled: False draws the boxes independently of each other.
        rho: least and greatest share of the smaller global crop that both share.
        scale: range of the log-uniform crop scale; 1 is the native spacing.
        containment: least share of a local crop within both global crops.
        foreground: wanted share of foreground in the shared part.
        candidates: pairs drawn at most while looking for that share.
        flip: axes that may be flipped; ``lr`` is left-right only, ``all`` is every axis.
        pairs_per_volume: crop pairs drawn from one volume per step.
    """

    enabled: bool = True
    global_size: Size3 = (96, 96, 96)
    local_size: Size3 = (48, 48, 48)
    n_local: int = 4
    rho: Range2 = (0.4, 0.8)
    scale: Range2 = (0.8, 1.25)
    containment: float = 0.5
    foreground: float = 0.3
    candidates: int = 8
    flip: Literal["none", "lr", "all"] = "lr"
    flip_probability: float = 0.5
    pairs_per_volume: int = 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                ordered("cvac.rho", self.rho, 0.05, 1.0),
                ordered("cvac.scale", self.scale, 0.25, 4.0),
                within("cvac.n_local", self.n_local, 0, 32),
                within("cvac.containment", self.containment, 0, 1),
                within("cvac.foreground", self.foreground, 0, 1),
                within("cvac.candidates", self.candidates, 1, 64),
                within("cvac.flip_probability", self.flip_probability, 0, 1),
                within("cvac.pairs_per_volume", self.pairs_per_volume, 1, 16),
            ]
        )
        return self


class AugmentConfig(Node):
    """Photometric augmentation of the network's input, never of the target."""

    enabled: bool = True
    gamma: Range2 = (0.7, 1.5)
    gamma_probability: float = 0.3
    scale: float = 0.15
    shift: float = 0.1
    noise_sigma: float = 0.03
    noise_probability: float = 0.1
    blur_sigma: Range2 = (0.5, 1.0)
    blur_probability: float = 0.2
    mr_bias_probability: float = 0.3
    mr_bias: float = 0.3
    ct_window_jitter: float = 0.1

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = (
            "gamma_probability",
            "noise_probability",
            "blur_probability",
            "mr_bias_probability",
        )
        require(
            [
                *(within(f"augment.{name}", getattr(self, name), 0, 1) for name in names),
                ordered("augment.gamma", self.gamma, 0.1, 10),
                ordered("augment.blur_sigma", self.blur_sigma, 0.05, 5),
                within("augment.noise_sigma", self.noise_sigma, 0, 1),
                within("augment.scale", self.scale, 0, 0.9),
                within("augment.shift", self.shift, 0, 1),
                within("augment.mr_bias", self.mr_bias, 0, 0.9),
                within("augment.ct_window_jitter", self.ct_window_jitter, 0, 0.9),
            ]
        )
        return self


class EaamConfig(Node):
    """Edge-aware adaptive masking.

    Attributes:
        enabled: False masks uniformly at random at the fixed ratio ``r0``.
        alpha_max: greatest preference for edges; ``warm`` the share of steps to reach it.
        reveal: share of the ``reveal_top`` strongest edge patches that stays visible.
        kappa: change of the ratio per standard deviation of edge density.
        unit: tokens along one side of a mask unit (2 for patch size 8 at full scale).
        co_mask: share of the second view's scores taken from what the first view hides.
    """

    enabled: bool = True
    edge: Literal["gaussian", "sobel"] = "gaussian"
    sigmas: tuple[float, ...] = (1.0, 2.0)
    noise_floor: bool = False
    pool: Literal["mean", "p90"] = "mean"
    score: Literal["rank", "log"] = "rank"
    schedule: Literal["linear", "cosine", "const"] = "linear"
    alpha_max: float = 4.0
    warm: float = 0.3
    reveal: float = 0.1
    reveal_top: float = 0.2
    r0: float = 0.6
    kappa: float = 0.05
    ratio_range: Range2 = (0.5, 0.75)
    density_momentum: float = 0.99
    mask_prob: float = 1.0
    co_mask: float = 0.0
    unit: int = 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = ("warm", "reveal", "reveal_top", "mask_prob", "co_mask", "density_momentum")
        require(
            [
                *(within(f"eaam.{name}", getattr(self, name), 0, 1) for name in names),
                ordered("eaam.ratio_range", self.ratio_range, 0.05, 0.95),
                within("eaam.r0", self.r0, 0.05, 0.95),
                within("eaam.kappa", self.kappa, -0.5, 0.5),
                within("eaam.alpha_max", self.alpha_max, 0, 50),
                within("eaam.unit", self.unit, 1, 8),
                "" if self.sigmas else "eaam.sigmas is empty. Name one or two, as in (1, 2).",
                *(within("eaam.sigmas", sigma, 0.3, 8) for sigma in self.sigmas),
            ]
        )
        return self
