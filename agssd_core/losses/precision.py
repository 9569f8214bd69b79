"""Which precision to compute in."""

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> torch.autocast:
    """A context in which products are not rounded to half precision behind our back."""
    return torch.autocast(x.device.type, enabled=False)
