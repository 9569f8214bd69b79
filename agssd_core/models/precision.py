"""Precision of tensors, and bf16 products where no bf16 hardware is."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.conv2d,
        torch.conv3d,
        functional.linear,
        torch.matmul,
        Tensor.matmul,
        Tensor.__matmul__,
        torch.bmm,
        Tensor.bmm,
        torch.einsum,
        functional.scaled_dot_product_attention,
    }
)
_active = threading.local()


def full(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ProductsInFloat32(TorchFunctionMode):
    """Under autocast, products of bf16 numbers by float32 kernels.

    On CPUs without bf16 arithmetic torch falls back to kernels many times slower than float32.
    Products of bf16 numbers are exact in float32 and bf16 hardware adds them in float32, so
    rounding the operands to bf16, multiplying by the float32 kernels and rounding the result
    gives what such hardware gives, up to the order of the sums.
    """

    def __enter__(self) -> "ProductsInFloat32":
        super().__enter__()  # type: ignore[no-untyped-call]
        _active.depth = getattr(_active, "depth", 0) + 1
        return self

    def __exit__(self, *error: Any) -> None:
        _active.depth -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func not in _PRODUCTS or not torch.is_autocast_enabled("cpu"):
            return func(*args, **named)
        with torch.autocast("cpu", enabled=False):
            found = func(*tree_map(_rounded, args), **tree_map(_rounded, named))
            return found.bfloat16()


def _rounded(value: Any) -> Any:
    """A float32 or bf16 tensor as float32 that holds bf16 numbers; anything else as it is."""
    if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bfloat16):
        return value.bfloat16().float()
    return value


def recompute_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For activation checkpointing: recompute as the forward pass computed."""
    again = ProductsInFloat32() if getattr(_active, "depth", 0) else nullcontext()
    return nullcontext(), again
