"""ANAUS's objective in its plainest form, of our own: what the efficient step is measured against.

The backbone runs anew for every scale and every set of images, the overlap batch is doubled to
match the two views, masks are 256 one-hot maps at full size, the pyramid is dense, every loss
stands in loops over views. Same weights, masks and drawn ids give the same loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from agssd_core.config import AnausConfig
from agssd_core.models.anaus import AnausNetwork, AnausPair, level_of
from agssd_core.training.anaus_build import build_lars
from agssd_core.training.anaus_step import Regions
from agssd_core.views.us_batch import UsBatch

IDS = 256


def naive_loss(
    pair: AnausPair, batch: UsBatch, regions: tuple[Regions, ...], anaus: AnausConfig
) -> Tensor:
    """Both terms over all scales; gradients reach the student."""
    size = batch.views.shape[-1]
    views, labels = batch.views.flatten(0, 1), batch.view_labels.flatten(0, 1)
    damaged, clean = torch.cat([batch.damaged] * 2), torch.cat([batch.clean] * 2)
    overlap_labels, valid = torch.cat([batch.overlap_labels] * 2), torch.cat([batch.valid] * 2)
    total = views.new_zeros(())
    for each in regions:
        level = level_of(each.scale, size)
        ids, ids_overlap = each.drawn.ids, torch.cat([each.drawn_overlap.ids] * 2)
        found = _projected(pair.student, views, _masks(labels, each.scale, ids), level)
        with torch.no_grad():
            goal = _projected(pair.teacher, views, _masks(labels, each.scale, ids), level)
        total = total + anaus.loss.align * _alignment(
            found.unflatten(0, (2, -1)),
            goal.unflatten(0, (2, -1)),
            ids.unflatten(0, (2, -1)),
            anaus.loss.temperature,
        )
        masks = _masks(overlap_labels, each.scale, ids_overlap)
        found = _projected(pair.student, damaged, masks, level)
        with torch.no_grad():
            masks = _masks(overlap_labels, each.scale, ids_overlap)
            goal = _projected(pair.teacher, clean, masks, level)
        used = valid[:, None] & (ids_overlap > 0)
        error = (found - goal).square().mean(dim=2)[used]
        total = total + anaus.loss.context * error.sum() / max(1, int(used.sum()))
    return total


def naive_step(
    pair: AnausPair, batch: UsBatch, regions: tuple[Regions, ...], anaus: AnausConfig
) -> Callable[[], float]:
    """Forward, loss, backward, LARS and EMA in the plain form."""
    optimiser = build_lars(pair, anaus)

    def run() -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = naive_loss(pair, batch, regions, anaus)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        pair.update_teacher(ema_momentum=0.99)
        return float(loss.detach())

    return run


def _masks(labels: Tensor, scale: int, ids: Tensor) -> Tensor:
    """(N, K, S * S) masks of the drawn ids, from all 256 one-hot maps at full size."""
    every = (torch.arange(IDS)[None, :, None, None] == labels[:, None]).float()
    owner = functional.adaptive_avg_pool2d(every, scale).argmax(dim=1)
    hot = functional.one_hot(owner, IDS).permute(0, 3, 1, 2).flatten(2).float()
    return hot.gather(1, ids[..., None].expand(-1, -1, hot.shape[2]))


def _projected(network: AnausNetwork, frames: Tensor, masks: Tensor, level: int) -> Tensor:
    dense = network.pyramid(network.maps(frames))[level].flatten(2)
    area = masks.sum(dim=2, keepdim=True).clamp_min(1)
    rows: Tensor = network.projector(level)((masks / area) @ dense.transpose(1, 2))
    return rows if network.predictor is None else network.predictor(rows)


def _alignment(found: Tensor, goal: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """DetCon's two halves, each with its own two products."""
    found, goal = functional.normalize(found, dim=-1), functional.normalize(goal, dim=-1)
    frames, draws = ids.shape[1:]
    same_frame = torch.eye(frames, dtype=torch.bool)[:, None, :, None]
    total = found.new_zeros(())
    for view, other in ((0, 1), (1, 0)):
        across = torch.einsum("abk,uvk->abuv", found[view], goal[other]) / temperature
        within = torch.einsum("abk,uvk->abuv", found[view], goal[view]) / temperature
        across_same = same_frame & (ids[view][:, :, None, None] == ids[other][None, None])
        within_same = same_frame & (ids[view][:, :, None, None] == ids[view][None, None])
        real_across = (ids[other] > 0)[None, None].expand_as(across)
        real_within = (ids[view] > 0)[None, None].expand_as(within)
        logits = torch.cat(
            [
                across.masked_fill(~real_across, -1e9),
                within.masked_fill(within_same | ~real_within, -1e9),
            ],
            dim=2,
        ).flatten(2)
        positive = (across_same & real_across).flatten(2)
        log_prob = logits.log_softmax(dim=2)[:, :, : positive.shape[2]]
        count = positive.sum(dim=2)
        cost = -(log_prob * positive).sum(dim=2) / count.clamp_min(1)
        weight = ((count > 0) & (ids[view] > 0)) / within_same.flatten(2).sum(dim=2)
        total = total + (cost * weight).sum() / (frames * draws)
    return total
