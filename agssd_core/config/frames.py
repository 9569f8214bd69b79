"""How ultrasound becomes grey frames."""

from typing import Self

from pydantic import model_validator

from agssd_core.config.node import Node, require, within


class FramesConfig(Node):
    """Preprocessing of ultrasound; CT and MR volumes do not depend on it.

    Attributes:
        max_side: a larger frame is shrunk until its longer side has so many pixels.
        min_side: a sector with a shorter side, in pixels, is left out.
        similarity: a frame that correlates more than this with the last kept one is thinned out.
        max_frames: kept of one clip, spread evenly.
        superpixels: aimed at inside a sector by the fall-back that needs no label maps.
    """

    max_side: int = 512
    min_side: int = 64
    similarity: float = 0.98
    max_frames: int = 64
    superpixels: int = 24

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                within("data.frames.max_side", self.max_side, 32, 4096),
                within("data.frames.min_side", self.min_side, 8, 4096),
                ""
                if self.min_side <= self.max_side
                else f"data.frames.min_side = {self.min_side} exceeds data.frames.max_side = "
                f"{self.max_side}. Lower the first or raise the second.",
                within("data.frames.similarity", self.similarity, 0, 1),
                within("data.frames.max_frames", self.max_frames, 1, 100000),
                within("data.frames.superpixels", self.superpixels, 2, 255),
            ]
        )
        return self
