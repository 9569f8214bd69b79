"""Per-patient gradients of this project's own layers, for Opacus.

Opacus knows Linear, Conv, LayerNorm and GroupNorm. A layer that it does not know it would run
again inside ``vmap``; these rules are exact, quicker, and do not depend on what vmap supports.
Importing this module registers them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from opacus.grad_sample.conv import compute_conv_grad_sample
from opacus.grad_sample.utils import register_grad_sampler
from torch import Tensor, nn
from torch.nn import functional

from agssd_core.models.anaus import RowGroupNorm
from agssd_core.models.cross_view import ChannelGate, GeometryBias
from agssd_core.models.heads import NormLinear
from agssd_core.models.tokens import ClsToken, Grid, MaskToken, PosEmbed

Found = dict[nn.Parameter, Tensor]
_GRIDS = "_called_grids"


def watch_grids(network: nn.Module) -> None:
    """Remember on which grid each position embedding is called; its rule takes them back.

    A backward pass meets the calls of a layer in reverse order, so a stack is enough.
    """
    for module in network.modules():
        if isinstance(module, PosEmbed) and module.weight.requires_grad:
            setattr(module, _GRIDS, [])
            module.register_forward_hook(_remember_grid, with_kwargs=True)


def forget_grids(network: nn.Module) -> None:
    """Empty the stacks after a pass that had no backward."""
    for module in network.modules():
        if hasattr(module, _GRIDS):
            getattr(module, _GRIDS).clear()


def _remember_grid(
    module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], _: Tensor
) -> None:
    if module.training and torch.is_grad_enabled():
        getattr(module, _GRIDS).append(named.get("grid", given[-1]))


@register_grad_sampler(PosEmbed)  # type: ignore[untyped-decorator, unused-ignore]
def pos_embed_gradients(layer: PosEmbed, _: Sequence[Tensor], backprops: Tensor) -> Found:
    """The interpolation's transpose, applied to each patient's own (N, E) gradient."""
    grid: Grid = getattr(layer, _GRIDS).pop()
    if grid == layer.grid:
        return {_weight(layer): backprops[:, None]}
    with torch.enable_grad():
        like = torch.zeros_like(layer.weight, dtype=backprops.dtype).expand(len(backprops), -1, -1)
        native = like.clone().requires_grad_()
        cube = native.transpose(1, 2).reshape(len(native), -1, *layer.grid)
        cube = functional.interpolate(cube, size=grid, mode="trilinear", align_corners=False)
        (found,) = torch.autograd.grad(cube.flatten(2).transpose(1, 2), native, backprops)
    return {_weight(layer): found[:, None]}


@register_grad_sampler(ClsToken)  # type: ignore[untyped-decorator, unused-ignore]
def cls_token_gradients(layer: ClsToken, _: Sequence[Tensor], backprops: Tensor) -> Found:
    """The token stands once in front of every row."""
    return {layer.weight: backprops[:, None, :1]}


@register_grad_sampler(MaskToken)  # type: ignore[untyped-decorator, unused-ignore]
def mask_token_gradients(layer: MaskToken, seen: Sequence[Tensor], backprops: Tensor) -> Found:
    """The token stands wherever a row is hidden."""
    mask = seen[1].to(backprops.dtype)
    return {layer.weight: torch.einsum("bn,bne->be", mask, backprops)[:, None, None]}


@register_grad_sampler(NormLinear)  # type: ignore[untyped-decorator, unused-ignore]
def norm_linear_gradients(layer: NormLinear, seen: Sequence[Tensor], backprops: Tensor) -> Found:
    """Gradient of the unit rows, less its part along them, over the rows' own length."""
    length = layer.weight.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    unit = layer.weight / length
    found = torch.einsum("b...k,b...e->bke", backprops, seen[0].to(backprops.dtype))
    along = torch.einsum("bke,ke->bk", found, unit)
    return {layer.weight: (found - along[..., None] * unit) / length}


@register_grad_sampler(ChannelGate)  # type: ignore[untyped-decorator, unused-ignore]
def gate_gradients(layer: ChannelGate, seen: Sequence[Tensor], backprops: Tensor) -> Found:
    """A product with the tokens."""
    return {layer.weight: torch.einsum("bne,bne->be", backprops, seen[0].to(backprops.dtype))}


@register_grad_sampler(GeometryBias)  # type: ignore[untyped-decorator, unused-ignore]
def geometry_gradients(layer: GeometryBias, seen: Sequence[Tensor], backprops: Tensor) -> Found:
    """A product with (2 q, -1), through the softplus."""
    places = seen[0].to(backprops.dtype)
    factors = torch.cat([2 * places, -torch.ones_like(places[..., :1])], dim=-1)
    along = torch.einsum("bhnc,bnc->bh", backprops, factors)
    return {layer.weight: along * torch.sigmoid(layer.weight)}


@register_grad_sampler(RowGroupNorm)  # type: ignore[untyped-decorator, unused-ignore]
def row_norm_gradients(layer: RowGroupNorm, seen: Sequence[Tensor], backprops: Tensor) -> Found:
    """As GroupNorm's, summed over a patient's rows."""
    flat = seen[0].to(backprops.dtype).flatten(0, -2)
    plain = functional.group_norm(flat, layer.num_groups, eps=layer.eps).view(backprops.shape)
    return {
        layer.weight: torch.einsum("b...c,b...c->bc", plain, backprops),
        layer.bias: torch.einsum("b...c->bc", backprops),
    }


@register_grad_sampler([nn.Conv2d, nn.Conv3d])  # type: ignore[untyped-decorator, unused-ignore]
def conv_gradients(
    layer: nn.Conv2d | nn.Conv3d, seen: Sequence[Tensor], backprops: Tensor
) -> Found:
    """Opacus' rule on tensors in plain order.

    It unfolds by strides and takes channels to come before pixels in memory; of a channels-last
    tensor it gives wrong numbers without an error (opacus 1.6.0).
    """
    found: Found = compute_conv_grad_sample(layer, [seen[0].contiguous()], backprops.contiguous())
    return found


def _weight(layer: PosEmbed) -> nn.Parameter:
    return layer.get_parameter("weight")
