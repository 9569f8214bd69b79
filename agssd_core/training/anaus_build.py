"""From configuration to ANAUS's pair and optimiser."""

from collections.abc import Mapping

import torch

from agssd_core.config import AnausConfig
from agssd_core.errors import TrainingError
from agssd_core.models.anaus import AnausPair, AnausShape
from agssd_core.models.resnet2d import ResnetShape
from agssd_core.training.lars import Lars
from agssd_core.views.seeds import rng_for

LEARNING_RATE_PER_256 = 0.3
_BUFFER = "momentum_buffer"


def pair_shape(anaus: AnausConfig) -> AnausShape:
    """The model's numbers."""
    backbone, head = anaus.backbone, anaus.head
    return AnausShape(
        backbone=ResnetShape(backbone.depth, backbone.width, backbone.norm, backbone.groups),
        fpn=head.fpn,
        hidden_projector=head.hidden_projector,
        projection=head.projection,
        hidden_predictor=head.hidden_predictor,
        share_statistics=anaus.share_statistics,
    )


def build_pair(anaus: AnausConfig, *, seed: int) -> AnausPair:
    """Draw a pair's round-0 weights; the same seed gives the same bits on any machine's CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng_for(seed, "weights", "us").integers(2**63 - 1)))
        return AnausPair(pair_shape(anaus)).train()


def peak_learning_rate(anaus: AnausConfig, *, batch_size: int, sites: int) -> float:
    """As configured, or BYOL's rule: 0.3 * (frames of a step over all sites of a round) / 256."""
    if anaus.optimiser.learning_rate is not None:
        return anaus.optimiser.learning_rate
    return LEARNING_RATE_PER_256 * batch_size * sites / 256


def build_lars(pair: AnausPair, anaus: AnausConfig) -> Lars:
    """LARS over the student; the learning rate is set at every step."""
    config = anaus.optimiser
    return Lars(
        pair.student.parameters(),
        learning_rate=0.0,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        trust=config.trust,
    )


def lars_tensors(pair: AnausPair, optimiser: Lars) -> dict[str, torch.Tensor]:
    """Momentum by the name of its parameter; empty before the first step."""
    return {
        name: optimiser.state[parameter][_BUFFER]
        for name, parameter in pair.student.named_parameters()
        if parameter in optimiser.state
    }


def load_lars_tensors(
    pair: AnausPair, optimiser: Lars, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what ``lars_tensors`` named; parameters without an entry start afresh.

    Raises:
        TrainingError: an entry has the shape of another model.
    """
    for name, parameter in pair.student.named_parameters():
        held = tensors.get(name)
        if held is None:
            optimiser.state.pop(parameter, None)
            continue
        if held.shape != parameter.shape:
            raise TrainingError(
                f"optimiser state of {name} has another shape than the model. Delete the site's "
                "training state, or use the configuration that it was saved under."
            )
        optimiser.state[parameter] = {_BUFFER: torch.zeros_like(parameter).copy_(held)}
