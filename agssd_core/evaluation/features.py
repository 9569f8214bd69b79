"""Patch tokens of student and teacher, and one colouring of both."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agssd_core.errors import ShapeError
from agssd_core.models.student_teacher import StudentTeacher

FloatArray = NDArray[np.float64]
COLOURS = 3
# Outliers would leave the rest of the tokens in one shade.
_CLIPPED_PERCENT = 2.0


@dataclass(frozen=True)
class TokenFeatures:
    """Patch tokens (V, B, N, E) of both networks for the same, unmasked crops."""

    student: Tensor
    teacher: Tensor


@contextmanager
def evaluating(model: StudentTeacher) -> Iterator[None]:
    """No gradient and ``eval`` mode in both networks; the student's mode is put back."""
    training = model.student.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.student.train(training)


def token_features(model: StudentTeacher, crops: Tensor) -> TokenFeatures:
    """Encode crops (V, B, 1, D, H, W), nothing hidden, with student and teacher.

    Returns:
        Tokens after the last norm, float32, on the CPU.
    """
    views, count = crops.shape[:2]
    with evaluating(model):
        _, student = model.student.encoder.forward_features(crops.flatten(0, 1))
        _, teacher = model.teacher.encoder.forward_features(crops.flatten(0, 1))
    return TokenFeatures(
        student=student.float().cpu().view(views, count, *student.shape[1:]),
        teacher=teacher.float().cpu().view(views, count, *teacher.shape[1:]),
    )


def joint_colours(student: Tensor, teacher: Tensor) -> tuple[FloatArray, FloatArray, float]:
    """Colour the tokens of both networks by one principal component analysis over both.

    One fit and one scale serve all tokens, so equal colours mean equal features in every view
    and network; a fit for each would give colours that cannot be compared.

    Args:
        student: (..., E) tokens.
        teacher: tokens of the same shape.

    Returns:
        Red, green and blue in [0, 1], (..., 3), of student and teacher, and the share of the
        variance that the three components hold.

    Raises:
        ShapeError: the shapes differ or E is under 3.
    """
    if student.shape != teacher.shape or student.shape[-1] < COLOURS:
        raise ShapeError(
            f"tokens {tuple(student.shape)} and {tuple(teacher.shape)} must have one shape and at "
            f"least {COLOURS} channels. Pass the tokens of the same views."
        )
    rows = torch.stack([student, teacher]).flatten(0, -2).double().numpy()
    rows = rows - rows.mean(axis=0)
    _, spread, axes = np.linalg.svd(rows, full_matrices=False)
    # The sign of a component is arbitrary; fixing it keeps colours from run to run.
    signs = np.sign(axes[np.arange(COLOURS), np.abs(axes[:COLOURS]).argmax(axis=1)])
    scores = rows @ (axes[:COLOURS] * signs[:, None]).T
    low, high = np.percentile(scores, [_CLIPPED_PERCENT, 100 - _CLIPPED_PERCENT], axis=0)
    scaled = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    both = scaled.reshape(2, *student.shape[:-1], COLOURS)
    held = float((spread[:COLOURS] ** 2).sum() / max((spread**2).sum(), 1e-300))
    return both[0], both[1], held
