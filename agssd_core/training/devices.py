"""Where a site's process trains."""

import torch

from agssd_core.errors import TrainingError


def training_device(named: str, rank: int = 0) -> torch.device:
    """``auto`` is CUDA where there is one; each process of a site takes its own.

    Raises:
        TrainingError: CUDA was asked for and is not there.
    """
    available = torch.cuda.is_available()
    if named == "cuda" and not available:
        raise TrainingError(
            "training.device = cuda, but no CUDA device is visible. Use training.device = auto."
        )
    if named == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())
