"""A tiny model for tests."""

import torch

from agssd_core.models.student_teacher import AgssdShape, StudentTeacher
from agssd_core.models.vit3d import VitShape

GRID = (4, 4, 4)


def tiny_vit(**changes) -> VitShape:
    plain = {"image_size": (16, 16, 16), "patch_size": 4, "width": 24, "depth": 2, "heads": 4}
    return VitShape(**(plain | changes))


def tiny_shape(vit: VitShape | None = None, **changes) -> AgssdShape:
    plain = {"prototypes": 16, "hidden": 32, "bottleneck": 12}
    return AgssdShape(vit=vit or tiny_vit(), **(plain | changes))


def tiny_model(seed: int = 0, vit: VitShape | None = None, **changes) -> StudentTeacher:
    torch.manual_seed(seed)
    return StudentTeacher(tiny_shape(vit, **changes))


def randomised(module: torch.nn.Module, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """Every parameter drawn anew, so that no test passes because something is 0 at the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std, generator=generator)
    return module
