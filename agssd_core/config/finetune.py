"""How an encoder is fine-tuned on labelled scans."""

from typing import Literal, Self

from pydantic import model_validator

from agssd_core.config.node import Node, require, within


class FinetuneConfig(Node):
    """AdamW over a number of steps that is the same for every start, so that starts compare.

    Attributes:
        steps: optimiser steps; there is no choice of a best one, as that would need scans held out
            a second time.
        batch: scans of a step; of a volume ``crops`` cubes of the encoder's size are cut.
        positive: share of the cubes whose centre lies in a structure; the others lie in the body.
        learning_rate: of the new layers; earlier ones have ``layer_decay`` times that of the next.
        warmup: share of the steps over which the learning rate rises; then it falls as a cosine.
        frozen: the encoder stays as it is and only new layers learn.
        overlap: of the windows that slide over a volume to predict it.
        feature_size: channels of the finest map of the segmentation decoder for volumes.
        device: ``auto`` takes CUDA where there is one.
    """

    steps: int = 1000
    batch: int = 2
    crops: int = 2
    positive: float = 0.5
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    warmup: float = 0.05
    layer_decay: float = 0.75
    max_grad_norm: float = 3.0
    frozen: bool = False
    overlap: float = 0.5
    feature_size: int = 16
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        limits = {
            "steps": (1, 1_000_000),
            "batch": (1, 4096),
            "crops": (1, 64),
            "positive": (0, 1),
            "learning_rate": (1e-9, 1),
            "weight_decay": (0, 10),
            "warmup": (0, 1),
            "layer_decay": (0.01, 1),
            "max_grad_norm": (1e-6, 1e6),
            "overlap": (0, 0.9),
            "feature_size": (4, 256),
        }
        require(
            [
                within(f"finetune.{name}", getattr(self, name), low, high)
                for name, (low, high) in limits.items()
            ]
        )
        return self
