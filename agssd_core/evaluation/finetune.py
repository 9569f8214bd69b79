"""Fine-tune an encoder on labelled scans, and judge it on held-out ones.

The last weights are kept. Choosing the best of several by the held-out scans would flatter them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from monai.losses import DiceCELoss
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from agssd_core.config import RunConfig
from agssd_core.config.finetune import FinetuneConfig
from agssd_core.config.tasks import TaskConfig
from agssd_core.errors import DataError, TrainingError
from agssd_core.evaluation.export_file import Network
from agssd_core.evaluation.finetune_batches import Batches
from agssd_core.evaluation.finetune_build import (
    Build,
    build_network,
    encoder_parts,
    load_encoder,
    network_build,
    parameter_groups,
)
from agssd_core.evaluation.finetune_predict import Predictor
from agssd_core.evaluation.labelled import LabelledScan, LabelledSet
from agssd_core.evaluation.metrics import classification_outcome, segmentation_outcome
from agssd_core.evaluation.outcome import Outcome
from agssd_core.evaluation.tasks import share_of_patients, structure_count, task_classes, task_mask
from agssd_core.training.devices import training_device
from agssd_core.training.mixed_precision import EncoderPrecision
from agssd_core.training.schedules import learning_rate
from agssd_core.weights import Weights

Progress = Callable[[int, int], None]
_CALIBRATION_STEPS = 16


@dataclass(frozen=True)
class Finetuned:
    """A network that was fine-tuned.

    Attributes:
        outcome: on the held-out scans, on the grid of pre-training.
        network: on the device it was trained on, in evaluation mode.
        build: how to build it again, see ``finetune_build.network_build``.
        classes: names of a classification's classes, in order; empty for a segmentation.
        losses: of every step.
        trained_on: names of the scans it learned from.
        overlap: of the windows it predicts with.
    """

    outcome: Outcome
    network: nn.Module
    build: Build
    classes: tuple[str, ...]
    losses: tuple[float, ...]
    trained_on: tuple[str, ...]
    overlap: float

    def predictor(self) -> Predictor:
        """Predicts prepared scans."""
        device = next(self.network.parameters()).device
        size, overlap = self.build["size"], self.overlap
        return Predictor(self.network, size=size, overlap=overlap, device=device)


def finetune(  # noqa: PLR0913 - the last four are named and have defaults
    scans: LabelledSet,
    task: TaskConfig,
    weights: Weights | None,
    config: RunConfig,
    settings: FinetuneConfig,
    *,
    fraction: float = 1.0,
    seed: int = 0,
    network: Network | None = None,
    progress: Progress | None = None,
) -> Finetuned:
    """Train on ``scans.train``, judge on ``scans.test``. The same arguments give the same bits.

    Args:
        scans: prepared as for pre-training.
        task: what is asked of them.
        weights: a checkpoint's arrays; None starts the same network from random weights.
        config: stored with the checkpoint.
        settings: of the training.
        fraction: of the training patients.
        seed: of new layers, batches and the share of patients.
        network: which of the checkpoint's pair; None is the teacher, or the student where
            teachers stay at the sites.
        progress: called with (done, total).

    Raises:
        DataError: no scan to learn from, or none to judge by, or a single class.
        WeightsError: the weights do not fit the configuration.
        TrainingError: the loss is not finite.
    """
    chosen = scans.of(task)
    classes = task_classes(chosen.scans, task) if task.kind == "classification" else ()
    held_out = chosen.test
    _require_scans(held_out, classes, task)
    learned = share_of_patients(chosen.train.scans, task, fraction=fraction, seed=seed)
    outputs = len(classes) or structure_count(task) + 1
    build = network_build(config, task, outputs, settings.feature_size)
    model = build_network(build, seed=seed)
    targets = LabelledSet(learned).targets(task, classes) if classes else None
    batches = Batches(learned, targets, task, size=build["size"], settings=settings, seed=seed)
    device = training_device(settings.device)
    model.to(device)
    unmeasured = weights is not None and load_encoder(
        model, weights, config, source=network or _merged(config)
    )
    if unmeasured:
        _measure_statistics(model, batches, device)
    losses = _train(model, batches, settings, device, progress)
    done = Finetuned(
        outcome=Outcome({}, {}, {}),
        network=model,
        build=build,
        classes=classes,
        losses=losses,
        trained_on=tuple(scan.scan for scan in learned),
        overlap=settings.overlap,
    )
    return replace(done, outcome=judge(done.predictor(), held_out, task, classes))


def judge(
    predictor: Predictor, scans: LabelledSet, task: TaskConfig, classes: Sequence[str]
) -> Outcome:
    """How well held-out scans are segmented or classified, on the grid of pre-training.

    Args:
        predictor: of a network for this task.
        scans: that take part in the task.
        task: what is asked.
        classes: of a classification, in order.
    """
    if task.kind == "classification":
        found = [_class_of(predictor, scan) for scan in scans.scans]
        return classification_outcome(np.stack(found), scans.targets(task, classes), scans.scans)
    predictions, masks = [], []
    for scan in scans.scans:
        arrays = scan.load()
        predictions.append(predictor.segment(arrays.image).argmax(0).astype(np.uint8))
        masks.append(task_mask(cast(NDArray[np.uint8], arrays.mask), task))
    return segmentation_outcome(predictions, scans.scans, masks, structure_count(task))


def _class_of(predictor: Predictor, scan: LabelledScan) -> NDArray[np.float64]:
    arrays = scan.load()
    return predictor.classify(arrays.image, arrays.inside)


def _train(
    model: nn.Module,
    batches: Batches,
    settings: FinetuneConfig,
    device: torch.device,
    progress: Progress | None,
) -> tuple[float, ...]:
    parts = encoder_parts(model)
    if settings.frozen:
        for part in parts:
            part.requires_grad_(requires_grad=False)
    groups = parameter_groups(model, decay=settings.layer_decay, weight_decay=settings.weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate)
    precision = EncoderPrecision(device, bf16=settings.precision == "bf16")
    segmentation = DiceCELoss(to_onehot_y=True, softmax=True)
    losses = []
    model.train()
    for part in parts if settings.frozen else ():
        part.eval()  # statistics stay as they are, too
    for step in range(settings.steps):
        images, truth = (each.to(device) for each in batches.draw(step))
        with precision:
            logits = model(images)
        loss = _loss(logits.float(), truth, segmentation)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss of step {step + 1} is {float(loss.detach())}. Lower "
                "finetune.learning_rate, or use finetune.precision = fp32."
            )
        _step(loss, model, optimiser, settings, step)
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(step + 1, settings.steps)
    return tuple(losses)


def _step(
    loss: Tensor,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    settings: FinetuneConfig,
    step: int,
) -> None:
    rate = learning_rate(
        step, settings.steps, peak=settings.learning_rate, low=0.0, warmup=settings.warmup
    )
    for group in optimiser.param_groups:
        group["lr"] = rate * group["share"]
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
    optimiser.step()


def _loss(logits: Tensor, truth: Tensor, segmentation: DiceCELoss) -> Tensor:
    if logits.dim() > 2:
        found: Tensor = segmentation(logits, truth)
        return found
    # Cubes of a scan vote together, as windows do when the scan is predicted.
    votes = logits.view(len(truth), -1, logits.shape[1]).mean(1)
    return functional.cross_entropy(votes, truth)


@torch.no_grad()
def _measure_statistics(model: nn.Module, batches: Batches, device: torch.device) -> None:
    """BatchNorm's means and variances over training batches, each batch counting alike."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta: list[Any] = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for step in range(_CALIBRATION_STEPS):
        model(batches.draw(step)[0].to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _merged(config: RunConfig) -> Network:
    return "student" if config.federation.merge.teacher_rule == "local" else "teacher"


def _require_scans(held_out: LabelledSet, classes: Sequence[str], task: TaskConfig) -> None:
    if not held_out.scans:
        raise DataError(
            f"no held-out scan answers task {task.name}. Check its label, structures and "
            "modalities, and make the split with held-out patients (--folds 5)."
        )
    if task.kind == "classification" and len(classes) < 2:
        raise DataError(
            f"task {task.name} finds {len(classes)} class(es), two are needed. Choose another "
            "label, or name the classes."
        )
