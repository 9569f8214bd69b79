"""The plain way to write AG-SSD's step, and a batch to try it on.

Same arithmetic, none of the economies: attention by einsum, one pass per view, heads and decoder
on every token, parameters of the teacher moved one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agssd_core.config import RunConfig
from agssd_core.losses.centring import centred_softmax
from agssd_core.losses.distillation import (
    cls_distillation_loss,
    fused_with_fallback,
    patch_cost,
    patch_distillation_loss,
)
from agssd_core.losses.reconstruction import masked_l1, patchify
from agssd_core.losses.rows import RowMeans, row_means
from agssd_core.models.heads import DistillationHead
from agssd_core.models.standardise import Moments, moments, standardise, updated_moments
from agssd_core.models.student_teacher import AgssdNetwork, StudentTeacher
from agssd_core.training.agssd_step import Learner
from agssd_core.training.build import build_optimiser, model_shape, set_rates
from agssd_core.training.hiding import Hidden, hide_tokens
from agssd_core.training.schedules import StepSchedule
from agssd_core.views.batch import ViewBatch, make_batch, token_grid
from agssd_core.views.masking import updated_density


@dataclass(frozen=True)
class Body:
    """What a sampler reads of one volume; see ``views.reading.VolumeLike``."""

    shape: tuple[int, int, int]
    foreground_size: tuple[int, int, int]
    foreground_integral: NDArray[np.int64]
    modality: str = "CT"
    foreground_start: tuple[int, int, int] = (0, 0, 0)
    foreground_step: int = 4


class Bodies:
    """A reader of one smooth random volume."""

    def __init__(self, side: int) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(1, 1, 12, 12, 12, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, size=(side,) * 3, mode="trilinear")
        self._array = fine[0, 0].numpy()
        cells = np.ones((-(-side // 4),) * 3, np.int64).cumsum(0).cumsum(1).cumsum(2)
        shape = (side, side, side)
        self.infos = (Body(shape, shape, np.pad(cells, ((1, 0),) * 3)),)

    def __len__(self) -> int:
        return 1

    def read_crop(
        self, index: int, start: tuple[int, int, int], size: tuple[int, int, int]
    ) -> NDArray[np.float32]:
        """A box of the only volume, 0."""
        assert index == 0  # noqa: S101 - a benchmark's own volume
        box = tuple(slice(s, s + e) for s, e in zip(start, size, strict=True))
        return np.ascontiguousarray(self._array[box])


def random_batch(config: RunConfig) -> ViewBatch:
    """One step's views of a random volume."""
    volumes = Bodies(config.agssd.cvac.global_size[0] * 4 // 3)
    size = config.training.batch_size
    return make_batch(volumes, config.agssd, seed=0, site="bench", step=0, batch_size=size)


def naive_learner(config: RunConfig) -> Learner:
    """As ``learner_for``, with attention as MONAI writes it."""
    from benchmarks.bench_agssd import learner_for

    learner = learner_for(config)
    shape = model_shape(config.agssd)
    model = StudentTeacher(replace(shape, vit=replace(shape.vit, plain_attention=True))).train()
    model.load_shared_weights(learner.model.shared_weights())
    optimiser = build_optimiser(model, config.training.optimiser)
    return replace(learner, model=model, optimiser=optimiser)


def naive_step(learner: Learner, batch: ViewBatch, rates: StepSchedule) -> Callable[[], float]:
    """The plain step, for ``ema`` cls statistics and ``volume`` patch statistics and centres."""
    model, agssd = learner.model, learner.agssd

    def run() -> float:
        hiding = hide_tokens(
            batch,
            agssd,
            alpha=2.0,
            state=model.state,
            generator=torch.Generator().manual_seed(0),
            group=learner.group,
        )
        hidden = hiding.hidden
        with torch.no_grad():
            cls_t, tokens_t = _encode(model.teacher, batch.globals_seen)
            fused_t = _fuse(model.teacher, tokens_t, tokens_t, batch, hidden, learner)
            fresh = moments(cls_t, dims=(0, 1))
            running = Moments(model.state.cls_mean, model.state.cls_var)
            running = updated_moments(running, fresh, momentum=0.98)
            logits_cls = model.teacher.head_cls(standardise(cls_t, running))
            logits = _head(model.teacher.head_patch, tokens_t, hidden)
            logits_fused = _head(model.teacher.head_patch, fused_t, hidden)
            centre = _volume_centre(logits, hidden)
            temperature = rates.teacher_temperature
            probs_cls = centred_softmax(logits_cls, model.state.centre_cls, temperature=temperature)
            probs = centred_softmax(logits, centre, temperature=temperature)
            probs_fused = centred_softmax(logits_fused, centre, temperature=temperature)
        learner.optimiser.zero_grad()
        cls_s, tokens_s = _encode(model.student, batch.globals_seen, hidden.mask)
        fused_s = _fuse(model.student, tokens_s, tokens_t, batch, hidden, learner)
        cls_l, _ = _encode(model.student, batch.locals_seen)
        student_cls = model.student.head_cls(standardise(torch.cat([cls_s, cls_l]), running))
        plain = _patch_means(_head(model.student.head_patch, tokens_s, hidden), probs, hidden)
        fused = _patch_means(
            _head(model.student.head_patch, fused_s, hidden), probs_fused, hidden, shared=True
        )
        fused = fused_with_fallback(plain, fused, hidden.fusible.flatten())
        grid = token_grid(agssd)
        voxels = torch.stack([model.student.decoder(tokens, grid) for tokens in tokens_s])
        target = patchify(batch.globals_clean.flatten(0, 1), agssd.model.patch_size)
        terms = {
            "patch": patch_distillation_loss(plain, fused, beta=rates.beta),
            "cls": cls_distillation_loss(student_cls, probs_cls, temperature=0.1),
            "rec": masked_l1(
                hidden.of(voxels),
                target.flatten(0, 1)[hidden.index],
                hidden.crop,
                rows=hidden.crops,
            ),
        }
        loss = sum(getattr(agssd.loss, name) * term for name, term in terms.items())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.student.parameters(), 3.0, foreach=False)
        set_rates(learner.optimiser, learning_rate=rates.learning_rate, decay=rates.weight_decay)
        learner.optimiser.step()
        _move_state(learner, rates, running, logits_cls, hiding.density)
        return loss.item()

    return run


def bare_pass(learner: Learner, batch: ViewBatch) -> Callable[[], float]:
    """Encoders, heads and decoder forward and backward on the tokens of our step, nothing else."""
    model, agssd = learner.model, learner.agssd
    hidden = hide_tokens(
        batch,
        agssd,
        alpha=2.0,
        state=model.state,
        generator=torch.Generator().manual_seed(0),
        group=learner.group,
    ).hidden
    views, count = batch.globals_seen.shape[:2]
    chosen = torch.cat([hidden.index, hidden.index[hidden.shared]])

    def heads(network: AgssdNetwork, cls: Tensor, tokens: Tensor) -> Tensor:
        patch = network.head_patch(tokens.flatten(0, 1)[chosen])
        return network.head_cls(cls).mean() + patch.mean()

    def run() -> float:
        with torch.no_grad():
            heads(model.teacher, *model.teacher.encode(batch.globals_seen.flatten(0, 1)))
        learner.optimiser.zero_grad()
        crops, mask = batch.globals_seen.flatten(0, 1), hidden.mask.flatten(0, 1)
        cls, tokens = model.student.encode(crops, mask)
        local, _ = model.student.encode(batch.locals_seen.flatten(0, 1))
        value = heads(model.student, torch.cat([cls, local]), tokens)
        rebuilt = model.student.decoder(tokens, token_grid(agssd), hidden.index)
        (value + rebuilt.mean()).backward()
        return views * count

    return run


def _encode(
    network: AgssdNetwork, crops: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One pass per view: (V, B, E) and (V, B, N, E)."""
    passes = [
        network.encode(view, None if mask is None else mask[number])
        for number, view in enumerate(crops)
    ]
    return torch.stack([cls for cls, _ in passes]), torch.stack([tokens for _, tokens in passes])


def _fuse(
    network: AgssdNetwork,
    tokens: Tensor,
    other: Tensor,
    batch: ViewBatch,
    hidden: Hidden,
    learner: Learner,
) -> Tensor:
    coords, grid = (batch.q12, batch.q21), token_grid(learner.agssd)
    fused = [
        network.cvaa.forward_with_rows(
            tokens[v], other[1 - v], coords[v], hidden.fuse_at[v], batch.key_mask[1 - v], grid
        )[0]
        for v in (0, 1)
    ]
    return torch.stack(fused)


def _head(head: DistillationHead, tokens: Tensor, hidden: Hidden) -> Tensor:
    """Scores of every token (T, B, N, K), standardised over the hidden ones of its volume."""
    statistics = moments(tokens, dims=(0, 2), valid=hidden.mask)
    return torch.stack([head(standardise(view, Moments(statistics.mean[0], statistics.var[0])))
                        for view in tokens])  # fmt: skip


def _volume_centre(logits: Tensor, hidden: Hidden) -> Tensor:
    return moments(logits, dims=(0, 2), valid=hidden.mask).mean


def _patch_means(
    logits: Tensor, probs: Tensor, hidden: Hidden, *, shared: bool = False
) -> RowMeans:
    cost = patch_cost(logits.flatten(0, 2), probs.flatten(0, 2), temperature=0.1)
    mask = hidden.mask & hidden.fuse_at if shared else hidden.mask
    crops = torch.arange(hidden.crops).repeat_interleave(mask.shape[-1])
    return row_means(cost, crops, rows=hidden.crops, weights=mask.flatten().float())


@torch.no_grad()
def _move_state(
    learner: Learner, rates: StepSchedule, running: Moments, logits: Tensor, density: Tensor
) -> None:
    model, state = learner.model, learner.model.state
    student = dict(model.student.named_parameters())
    for name, parameter in model.teacher.named_parameters():
        parameter.mul_(rates.ema_momentum).add_(student[name], alpha=1 - rates.ema_momentum)
    state.centre_cls.mul_(0.9).add_(logits.mean(dim=(0, 1)), alpha=0.1)
    state.cls_mean.copy_(running.mean)
    state.cls_var.copy_(running.var)
    mean, std = updated_density(state.density_mean, state.density_std, density, 0.99)
    state.density_mean.copy_(mean)
    state.density_std.copy_(std)
