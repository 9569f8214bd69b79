"""bf16 encoders on CPUs with and without bf16 arithmetic."""

import pytest
import torch
from torch import nn

from agssd_core.training import mixed_precision
from agssd_core.training.mixed_precision import EncoderPrecision

CPU = torch.device("cpu")


@pytest.fixture
def without_bf16(monkeypatch):
    """A CPU that has no bf16 arithmetic."""
    monkeypatch.setattr(mixed_precision, "has_bf16_arithmetic", lambda: False)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Flatten(2),
        nn.Linear(9, 5),
    )


def outputs(model, frames):
    """Result and gradients under bf16."""
    model.zero_grad()
    with EncoderPrecision(CPU, bf16=True):
        found = model(frames)
    found.float().square().sum().backward()
    return found, [each.grad.clone() for each in model.parameters()]


def test_float32_kernels_give_what_bf16_kernels_give(without_bf16, monkeypatch):
    model, frames = network(), torch.randn(2, 3, 8, 8)
    ours, our_gradients = outputs(model, frames)
    monkeypatch.setattr(mixed_precision, "has_bf16_arithmetic", lambda: True)
    torchs, torch_gradients = outputs(model, frames)
    assert ours.dtype == torchs.dtype == torch.bfloat16
    # Both round every product's result to 8 bits of mantissa; only the order of the sums differs.
    torch.testing.assert_close(ours, torchs, rtol=2**-6, atol=2**-6)
    for one, other in zip(our_gradients, torch_gradients, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_operands_are_rounded_to_bf16(without_bf16):
    fine = torch.tensor([[1.0 + 2**-12]])
    with EncoderPrecision(CPU, bf16=True):
        found = nn.functional.linear(fine, torch.tensor([[1024.0]]))
    assert found.item() == 1024.0


def test_attention_is_rounded_too_and_masks_are_left_alone(without_bf16):
    q = torch.randn(1, 2, 4, 8)
    hidden = torch.ones(4, 4, dtype=torch.bool).tril()
    with EncoderPrecision(CPU, bf16=True):
        found = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=hidden)
    exact = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=hidden)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)


def test_heads_that_leave_autocast_stay_in_float32(without_bf16):
    fine = torch.tensor([[1.0 + 2**-12]])
    with EncoderPrecision(CPU, bf16=True), torch.autocast("cpu", enabled=False):
        found = nn.functional.linear(fine, torch.tensor([[1.0]]))
    assert found.dtype == torch.float32
    assert found.item() == fine.item()


def test_it_may_be_entered_again_and_leaves_nothing_behind(without_bf16):
    precision, x = EncoderPrecision(CPU, bf16=True), torch.ones(1, 1)
    for _ in range(2):
        with precision:
            assert nn.functional.linear(x, x).dtype == torch.bfloat16
    assert nn.functional.linear(x, x).dtype == torch.float32


def test_without_bf16_nothing_changes(without_bf16):
    x = torch.randn(2, 3)
    with EncoderPrecision(CPU, bf16=False):
        found = nn.functional.linear(x, x)
    assert torch.equal(found, nn.functional.linear(x, x))
