"""Fit LP-SAM on public images in two stages.

Stage ``adapters`` teaches SAM ultrasound from clicks and boxes that are drawn from the public
masks. Stage ``engine`` freezes that, and teaches latent prompts to find the structures by
themselves; each structure of a frame goes to the prompt whose mask costs least.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from agssd_core.config.lpsam import LpsamConfig, LpsamStageConfig
from agssd_core.errors import TrainingError
from agssd_core.losses.delineation import (
    CODE,
    DelineationWeights,
    delineation_loss,
    prompted_loss,
)
from agssd_core.models.lpsam import LpSam, Stage
from agssd_core.models.lpsam_encoder import LpsamShape
from agssd_core.models.sam_weights import load_sam
from agssd_core.training.lpsam_frames import FitFrame, Progress, draw_prompts, make_batch
from agssd_core.views.seeds import rng_for

WARMUP = 0.05
MAX_GRAD_NORM = 1.0
CURVE_POINTS = 100


@dataclass
class FitRecord:
    """What the fit was and how it went.

    Attributes:
        parameters: trained in each stage.
        curve: for each stage, (step, mean loss of the steps since the last entry).
        weights_digest: of SAM's file; empty from nothing.
    """

    seed: int
    frames: int
    structures: int
    parameters: dict[str, int] = field(default_factory=dict)
    curve: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    weights_digest: str = ""


def lpsam_shape(config: LpsamConfig) -> LpsamShape:
    """The network's numbers."""
    size, window = config.size, config.window_size
    regions, tokens, blocks = config.regions, config.tokens, config.blocks
    if config.architecture == "vit-b":
        return LpsamShape(
            image_size=size, window=window, regions=regions, tokens=tokens, blocks=blocks
        )
    return LpsamShape(
        image_size=size,
        width=96,
        depth=4,
        heads=3,
        window=window,
        global_blocks=(1, 3),
        channels=64,
        decoder_mlp=256,
        stem=16,
        regions=regions,
        tokens=tokens,
        blocks=blocks,
    )


def build_lpsam(config: LpsamConfig, *, seed: int) -> tuple[LpSam, str]:
    """Draw the network and put SAM's weights under it where they are named.

    Returns:
        The network and the digest of SAM's file, empty from nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng_for(seed, "weights", "lpsam").integers(2**63 - 1)))
        network = LpSam(lpsam_shape(config))
    digest = (
        load_sam(network, config.weights, digest=config.weights_digest) if config.weights else ""
    )
    return network, digest


def fit_lpsam(
    frames: Sequence[FitFrame],
    config: LpsamConfig,
    *,
    seed: int,
    progress: Progress = lambda _done, _total: None,
    device: torch.device | None = None,
) -> tuple[LpSam, FitRecord]:
    """Both stages; the same frames, settings and seed give the same bits on the CPU.

    Raises:
        TrainingError: the loss or a gradient is not finite, or there is nothing to fit on.
    """
    structures = sum(len(frame.structures) for frame in frames)
    if not structures:
        raise TrainingError("no frame has a structure, at least one is needed. Add masks.")
    network, digest = build_lpsam(config, seed=seed)
    network.to(device or torch.device("cpu"))
    record = FitRecord(seed, len(frames), structures, weights_digest=digest)
    total = config.adapters.steps + config.engine.steps
    work = _Work(network, config, seed, record)
    work.run("adapters", [f for f in frames if len(f.structures)], progress, (0, total))
    work.run("engine", list(frames), progress, (config.adapters.steps, total))
    network.eval().requires_grad_(False)  # noqa: FBT003 - torch's own signature
    return network, record


def prompted_step(
    network: LpSam, batch_frames: Sequence[FitFrame], rng: np.random.Generator, config: LpsamConfig
) -> Tensor:
    """Loss of stage ``adapters`` on one batch."""
    batch = make_batch(batch_frames, rng, config)
    prompts, chosen = draw_prompts(batch.full, rng)
    device = next(network.parameters()).device
    embedding = network.encode(batch.images.to(device))
    logits, iou = network.decode(embedding, network.drawn_prompts(prompts.to(device)))
    real = [(frame, place) for frame, picks in enumerate(chosen) for place in range(len(picks))]
    rows, places = (torch.tensor(part, device=device) for part in zip(*real, strict=True))
    wanted = torch.cat(
        [masks[picks] for masks, picks in zip(batch.structures, chosen, strict=True)]
    )
    return prompted_loss(
        logits[rows, places], iou[rows, places], wanted.to(device), weights=mask_weights(config)
    )


def latent_step(
    network: LpSam, batch_frames: Sequence[FitFrame], rng: np.random.Generator, config: LpsamConfig
) -> Tensor:
    """Loss of stage ``engine`` on one batch; the encoder is read without gradients."""
    batch = make_batch(batch_frames, rng, config)
    device = next(network.parameters()).device
    images = batch.images.to(device)
    with torch.no_grad():
        embedding = network.encode(images)
    logits, iou = network.decode(embedding, network.latent_prompts(images, embedding))
    structures = [masks.to(device) for masks in batch.structures]
    return delineation_loss(logits, iou, structures, weights=mask_weights(config))


def mask_weights(config: LpsamConfig) -> DelineationWeights:
    """Shares of the mask terms."""
    return CODE if config.loss == "code" else DelineationWeights(alpha=config.alpha)


Step = Callable[[LpSam, Sequence[FitFrame], np.random.Generator, LpsamConfig], Tensor]
_STEPS: dict[Stage, Step] = {"adapters": prompted_step, "engine": latent_step}


@dataclass
class _Work:
    network: LpSam
    config: LpsamConfig
    seed: int
    record: FitRecord

    def run(
        self,
        stage: Stage,
        frames: Sequence[FitFrame],
        progress: Progress,
        bar: tuple[int, int],
    ) -> None:
        """Take one stage's steps; ``bar`` is where the progress stands and its total."""
        plan: LpsamStageConfig = getattr(self.config, stage)
        chosen = self.network.freeze_for(stage, pretrained=bool(self.config.weights))
        self.record.parameters[stage] = sum(item.numel() for item in chosen)
        optimiser = torch.optim.Adam(chosen, lr=plan.learning_rate)
        every, begun = max(1, plan.steps // CURVE_POINTS), time.perf_counter()
        curve: list[tuple[int, float]] = []
        window: list[float] = []
        self.network.train()
        for step in range(plan.steps):
            optimiser.param_groups[0]["lr"] = _rate(plan, step)
            rng = rng_for(self.seed, "lpsam", stage, step)
            picked = batch_numbers(len(frames), plan.batch_size, seed=self.seed, step=step)
            loss = _STEPS[stage](self.network, [frames[n] for n in picked], rng, self.config)
            window.append(_take_step(loss, optimiser, chosen))
            if (step + 1) % every == 0 or step + 1 == plan.steps:
                curve.append((step + 1, sum(window) / len(window)))
                window = []
            progress(bar[0] + step + 1, bar[1])
        self.record.curve[stage] = curve
        self.record.seconds[stage] = time.perf_counter() - begun


def batch_numbers(count: int, size: int, *, seed: int, step: int) -> list[int]:
    """Frames of a step: one shuffled pass after another, cut into batches."""
    places = range(step * size, (step + 1) * size)
    passes = {
        number: rng_for(seed, "lpsam", "order", number).permutation(count)
        for number in {place // count for place in places}
    }
    return [int(passes[place // count][place % count]) for place in places]


def _take_step(
    loss: Tensor, optimiser: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
) -> float:
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    value = loss.item()
    if not (math.isfinite(value) and math.isfinite(norm.item())):
        raise TrainingError(
            f"the loss of LP-SAM's fit is {value} and its gradient {norm.item()}; both must be "
            "finite. Lower the learning rate of this stage and start again."
        )
    optimiser.step()
    return value


def _rate(plan: LpsamStageConfig, step: int) -> float:
    warm = max(1, round(WARMUP * plan.steps))
    if step < warm:
        return plan.learning_rate * (step + 1) / warm
    share = (step - warm) / max(1, plan.steps - warm)
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
