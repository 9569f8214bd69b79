"""Teacher targets: centring and Sinkhorn-Knopp, alone and over two processes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.losses.centring import centred_softmax, sinkhorn, updated_centre


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def logits(tokens=40, prototypes=8, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, prototypes, generator=drawn, dtype=torch.float64) * 2 - 1


def in_two_processes(task, parts):
    """Run a task on each part with a sum over both; threads meet at every call of it."""
    from threading import Barrier, Thread

    meeting, boxes, results = Barrier(2, timeout=30), [None, None], [None, None]

    def run(rank):
        def all_sum(x):
            boxes[rank] = x
            meeting.wait()
            total = boxes[0] + boxes[1]
            meeting.wait()
            return total

        results[rank] = task(parts[rank], all_sum)

    threads = [Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_centred_targets_are_the_formula():
    scores, centre = logits(3, 4), torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=torch.float64)
    found = centred_softmax(scores, centre, temperature=0.04)
    for i in range(3):
        raised = [
            math.exp((float(s) - float(c)) / 0.04) for s, c in zip(scores[i], centre, strict=True)
        ]
        assert found[i].tolist() == pytest.approx([r / sum(raised) for r in raised], rel=1e-9)
    assert torch.equal(centred_softmax(scores, None, temperature=0.04), (scores / 0.04).softmax(-1))


def test_each_volume_can_have_its_own_centre():
    scores = torch.randn(2, 3, 16, 8)  # (T, B, N, K)
    centre = scores.mean(dim=(0, 2), keepdim=True)
    found = centred_softmax(scores, centre, temperature=0.04)
    other = scores.clone()
    other[:, 1:] += torch.randn(8)
    again = centred_softmax(other, other.mean(dim=(0, 2), keepdim=True), temperature=0.04)
    assert torch.equal(found[:, 0], again[:, 0])


def test_the_centre_is_an_average_without_gradient():
    centre, scores = torch.randn(8, dtype=torch.float64), logits().requires_grad_()
    found = updated_centre(centre, scores, momentum=0.9)
    torch.testing.assert_close(found, 0.9 * centre + 0.1 * scores.detach().mean(0))
    assert not found.requires_grad
    assert torch.equal(updated_centre(centre, scores, momentum=1.0), centre)
    torch.testing.assert_close(updated_centre(centre, scores.reshape(5, 8, 8), momentum=0.9), found)


def test_no_logits_leave_the_centre_alone():
    centre = torch.randn(8)
    assert torch.equal(updated_centre(centre, torch.zeros(0, 8), momentum=0.9), centre)


def test_m10_two_processes_hold_the_same_centre():
    centre, scores = torch.randn(8, dtype=torch.float64), logits()
    found = in_two_processes(
        lambda part, all_sum: updated_centre(centre, part, momentum=0.9, all_sum=all_sum),
        (scores[:13], scores[13:]),
    )
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], updated_centre(centre, scores, momentum=0.9))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    tokens=st.integers(8, 60),
    temperature=st.sampled_from([0.04, 0.07, 1.0]),
)
def test_m10_sinkhorn_is_the_published_loop_and_its_rows_sum_to_one(seed, tokens, temperature):
    scores = logits(tokens, 8, seed)
    table = (scores / temperature).exp().T  # (K, P), as SwAV writes it
    table /= table.sum()
    for _ in range(3):
        table /= table.sum(dim=1, keepdim=True) * 8
        table /= table.sum(dim=0, keepdim=True) * tokens
    found = sinkhorn(scores, temperature=temperature)
    torch.testing.assert_close(found, (table * tokens).T, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(found.sum(1), torch.ones(tokens).double(), atol=1e-9, rtol=0)


def test_m10_columns_are_used_alike():
    found = sinkhorn(logits(400, 8), temperature=0.5, iterations=10)
    torch.testing.assert_close(found.sum(0), torch.full((8,), 50.0).double(), rtol=1e-3, atol=0)
    # Even when every token prefers the same prototype.
    biased = logits(400, 8) + torch.tensor([1.0] + [0.0] * 7)
    assert sinkhorn(biased, temperature=0.5, iterations=10).sum(0)[0] < 51


def test_m10_sinkhorn_over_two_processes_is_that_of_one():
    scores = logits(50, 8)
    found = in_two_processes(
        lambda part, all_sum: sinkhorn(part, temperature=0.04, all_sum=all_sum),
        (scores[:11], scores[11:]),
    )
    expected = sinkhorn(scores, temperature=0.04)
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("extreme", [0.0, 1e4, -1e4])
def test_sinkhorn_stays_finite(extreme):
    scores = logits().float()
    scores[0, 0] = extreme
    found = sinkhorn(scores, temperature=0.04)
    assert torch.isfinite(found).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn(scores, temperature=0.04), found)


def test_sinkhorn_of_nothing_is_nothing():
    assert sinkhorn(torch.zeros(0, 8), temperature=0.04).shape == (0, 8)
