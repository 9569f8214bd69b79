"""LP-SAM: network, two-stage fit and label maps.

Source: after the ANAUS paper and its released code; docs/lpsam.md says what differs.
"""

from typing import Literal, Self

from pydantic import model_validator

from agssd_core.config.node import Node, Range2, ordered, require, within

_ARCHITECTURE_SIZE = {"vit-b": 256, "small": 128}
STRIDE = 8


class LpsamStageConfig(Node):
    """One stage of the fit: Adam with a short warm-up and a cosine to 0."""

    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 5e-4

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                within("lpsam stage steps", self.steps, 0, 10_000_000),
                within("lpsam stage batch_size", self.batch_size, 1, 4096),
                within("lpsam stage learning_rate", self.learning_rate, 1e-9, 1),
            ]
        )
        return self


class LpsamAugmentConfig(Node):
    """Changes of a public frame, each with its own probability.

    Attributes:
        rotate: greatest turn to either side, degrees.
        scale, contrast, gamma: ranges; scale enlarges about a random point.
        p: probability of each of these four.
        flip_p: probability of a horizontal flip; 0 in the released code.
    """

    rotate: float = 30.0
    scale: Range2 = (1.0, 1.3)
    contrast: Range2 = (0.8, 2.0)
    gamma: Range2 = (1.0, 2.4)
    p: float = 0.5
    flip_p: float = 0.5

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                within("lpsam.augment.rotate", self.rotate, 0, 180),
                ordered("lpsam.augment.scale", self.scale, 0.5, 4),
                ordered("lpsam.augment.contrast", self.contrast, 0.1, 10),
                ordered("lpsam.augment.gamma", self.gamma, 0.1, 10),
                within("lpsam.augment.p", self.p, 0, 1),
                within("lpsam.augment.flip_p", self.flip_p, 0, 1),
            ]
        )
        return self


class LpsamRulesConfig(Node):
    """From masks to one label map.

    Attributes:
        mask: least probability of a pixel. iou: least predicted IoU of a prompt's mask.
        component: least size of a connected piece, as a share of the sector.
    """

    mask: float = 0.5
    iou: float = 0.6
    component: float = 0.001

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                within("lpsam.rules.mask", self.mask, 0.01, 0.99),
                within("lpsam.rules.iou", self.iou, 0, 1),
                within("lpsam.rules.component", self.component, 0, 1),
            ]
        )
        return self


class LpsamConfig(Node):
    """The whole of LP-SAM.

    Attributes:
        architecture: ``vit-b`` has SAM ViT-B's sizes and wants its weights; ``small`` is trained
            from nothing and runs on a CPU.
        weights: a local folder or file of SAM's weights, or a hub name where there is a network;
            empty trains from nothing.
        weights_digest: SHA-256 that the file of weights must have; empty does not check.
        image_size: edge of the padded input, pixels, a multiple of 8; None is the architecture's
            own, 256 for ``vit-b`` and 128 for ``small``.
        window: tokens along a window; None is 14 with SAM's weights and 16 from nothing.
        regions: R, latent prompts; 1 is the released form. tokens: T of each.
        blocks: N, blocks of the latent prompt engine.
        loss: ``paper`` mixes BCE and Dice by alpha; ``code`` is the released 0.2 and 0.8.
        adapters: stage 1. engine: stage 2.
        hold_out: share of the public images that is kept out of the fit and measured on.
        structures: masks of one image are ``separate`` anatomies, or one ``union``.
    """

    architecture: Literal["vit-b", "small"] = "small"
    weights: str = ""
    weights_digest: str = ""
    image_size: int | None = None
    window: int | None = None
    regions: int = 8
    tokens: int = 2
    blocks: int = 4
    loss: Literal["paper", "code"] = "paper"
    alpha: float = 0.15
    adapters: LpsamStageConfig = LpsamStageConfig()
    engine: LpsamStageConfig = LpsamStageConfig()
    augment: LpsamAugmentConfig = LpsamAugmentConfig()
    rules: LpsamRulesConfig = LpsamRulesConfig()
    hold_out: float = 0.1
    structures: Literal["separate", "union"] = "separate"

    @property
    def size(self) -> int:
        """Edge of the padded input, pixels."""
        return self.image_size or _ARCHITECTURE_SIZE[self.architecture]

    @property
    def window_size(self) -> int:
        """Tokens along a window."""
        return self.window or (14 if self.weights else 16)

    @model_validator(mode="after")
    def _check(self) -> Self:
        size, digest = self.size, self.weights_digest
        require(
            [
                within("lpsam.image_size", size, 32, 2048),
                ""
                if size % STRIDE == 0
                else f"lpsam.image_size = {size} is not a multiple of {STRIDE}. "
                f"Try {-(-size // STRIDE) * STRIDE}.",
                within("lpsam.window", self.window_size, 1, 256),
                within("lpsam.regions", self.regions, 1, 64),
                within("lpsam.tokens", self.tokens, 1, 64),
                within("lpsam.blocks", self.blocks, 1, 32),
                within("lpsam.alpha", self.alpha, 0, 1),
                within("lpsam.hold_out", self.hold_out, 0, 0.9),
                ""
                if not digest or _is_digest(digest)
                else "lpsam.weights_digest is not 64 hexadecimal digits. Use `sha256sum FILE`.",
                "lpsam.architecture = small has no published weights. Leave lpsam.weights empty."
                if self.weights and self.architecture == "small"
                else "",
            ]
        )
        return self


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
