"""LARS against its formula written one parameter at a time, in float64."""

import pytest
import torch

from agssd_core.errors import TrainingError
from agssd_core.training.lars import Lars

SETTINGS = {"momentum": 0.9, "weight_decay": 1e-2, "trust": 1e-3}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (4,), (2, 4, 3, 3), (2,), (5, 5)]
    found = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    found[4].zero_()  # a norm of 0
    return [torch.nn.Parameter(each) for each in found]


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters()]


def plain(steps, rates):
    weights = [p.detach().clone() for p in parameters()]
    buffers = [torch.zeros_like(w) for w in weights]
    for step, rate in zip(range(steps), rates, strict=True):
        for index, (w, g) in enumerate(zip(weights, gradients(step), strict=True)):
            decay, local = 0.0, 1.0
            if w.dim() > 1:
                decay = SETTINGS["weight_decay"]
                size, slope = w.pow(2).sum().sqrt().item(), g.pow(2).sum().sqrt().item()
                if size > 0 and slope > 0:
                    local = SETTINGS["trust"] * size / (slope + decay * size)
            buffers[index] = SETTINGS["momentum"] * buffers[index] + (g + decay * w) * local * rate
            weights[index] = w - buffers[index]
    return weights


def test_steps_equal_the_formula_with_a_rate_that_changes():
    found, rates = parameters(), [0.1, 0.5, 0.05, 0.2]
    optimiser = Lars(found, learning_rate=0.0, **SETTINGS)
    for step, rate in enumerate(rates):
        for parameter, gradient in zip(found, gradients(step), strict=True):
            parameter.grad = gradient
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
    for parameter, expected in zip(found, plain(4, rates), strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)


def test_row_19_norm_and_bias_parameters_have_neither_decay_nor_trust_ratio():
    """By their dimension, so that a stem's norm is not missed by its name."""
    bias = torch.nn.Parameter(torch.full((3,), 2.0))
    bias.grad = torch.ones(3)
    Lars([bias], learning_rate=0.5, weight_decay=0.9).step()
    assert bias.tolist() == [1.5] * 3


def test_a_parameter_without_gradient_stays_and_a_zero_gradient_keeps_its_momentum():
    still, moving = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimiser = Lars([still, moving], learning_rate=1.0, weight_decay=0.0)
    moving.grad = torch.ones(2, 2)
    optimiser.step()
    first = 1 - moving[0, 0].item()
    moving.grad = torch.zeros(2, 2)
    optimiser.step()
    assert still.eq(1).all()
    assert 1 - first - moving[0, 0].item() == pytest.approx(0.9 * first, rel=1e-3)


def test_impossible_numbers_are_refused():
    with pytest.raises(TrainingError, match=r"Mend anaus\.optimiser"):
        Lars(parameters(), learning_rate=0.1, momentum=1.0)
