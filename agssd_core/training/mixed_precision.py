"""bf16 autocast, also on CPUs that have no bf16 arithmetic."""

import platform
from contextlib import ExitStack
from functools import cache

import torch

from agssd_core.models.precision import ProductsInFloat32


@cache
def has_bf16_arithmetic() -> bool:
    """Whether this CPU multiplies bf16 numbers itself; other than x86 torch is trusted to know."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


class EncoderPrecision:
    """Runs encoders in bf16, or as they are; may be entered again and again.

    Args:
        device: of the tensors.
        bf16: False changes nothing.
    """

    def __init__(self, device: torch.device, *, bf16: bool) -> None:
        self._device, self._bf16 = device, bf16
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        stack.enter_context(
            torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16)
        )
        if self._bf16 and self._device.type == "cpu" and not has_bf16_arithmetic():
            stack.enter_context(ProductsInFloat32())
        self._entered.append(stack)

    def __exit__(self, *error: object) -> None:
        self._entered.pop().__exit__(None, None, None)
