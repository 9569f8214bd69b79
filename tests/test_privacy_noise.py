"""The noise: normal, fresh, and not to be confused with half of it."""

import numpy as np
import pytest
import torch
from scipy import stats

from agssd_core.noise import NoiseStream
from agssd_core.training.privacy.mechanism import NoisedCentre, noised_mean, normal_like
from tests.support.privacy import private_config

COUNT = 200_000


def chi_square(values):
    """p of 100 equally likely bins of the standard normal distribution."""
    edges = stats.norm.ppf(np.linspace(0, 1, 101))
    return stats.chisquare(np.histogram(values, edges)[0]).pvalue


def looks_normal(values):
    return min(chi_square(values), stats.kstest(values, "norm").pvalue) > 1e-4


def test_the_noise_is_standard_normal():
    values = NoiseStream.repeatable(1, "normal").normal(COUNT)
    assert looks_normal(values)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01
    half = len(values) // 2
    assert abs(np.corrcoef(np.abs(values[:half]), np.abs(values[half:]))[0, 1]) < 0.01


@pytest.mark.parametrize("factor", [0.5, 0.97, 1.03])
def test_noise_of_another_size_is_noticed(factor):
    assert not looks_normal(factor * NoiseStream.repeatable(1, "normal").normal(COUNT))


def test_what_is_released_bears_the_whole_noise():
    """sigma times the limit over the expected batch, whatever was drawn."""
    mean = noised_mean(
        torch.zeros(COUNT, dtype=torch.float64),
        limit=0.3, sigma=2.0, expected=7.0, stream=NoiseStream.repeatable(2),
    )  # fmt: skip
    assert looks_normal((mean / (2.0 * 0.3 / 7.0)).numpy())
    assert not looks_normal((mean / (1.0 * 0.3 / 7.0)).numpy())


def test_the_centre_bears_its_own_noise():
    privacy = private_config(
        privacy={"noise_multiplier": 2.0, "centre_ratio": 3.0, "centre_norm": 0.5}
    ).privacy
    like = torch.zeros(COUNT, dtype=torch.float64)
    centre = like.clone()
    NoisedCentre(privacy, like).move(centre, momentum=0.0, stream=NoiseStream.repeatable(3))
    assert looks_normal((centre / (6.0 * 0.5 / 4.0)).numpy())


def test_odd_counts_and_pieces_give_that_many_numbers():
    stream = NoiseStream.repeatable(0)
    for count in (0, 1, 7, (1 << 16) + 3):
        assert stream.normal(count).shape == (count,)
    drawn = stream.uniform(COUNT)
    assert 0 < drawn.min() <= drawn.max() <= 1
    assert stats.kstest(drawn, "uniform").pvalue > 1e-4


def test_streams_of_the_system_differ_and_a_repeatable_one_is_marked():
    first, second = NoiseStream.from_system(), NoiseStream.from_system()
    assert not np.array_equal(first.normal(16), second.normal(16))
    assert first.private
    again = [NoiseStream.repeatable(4, "a", 1).normal(16) for _ in range(2)]
    assert np.array_equal(*again)
    assert not np.array_equal(again[0], NoiseStream.repeatable(4, "a", 2).normal(16))
    assert not NoiseStream.repeatable(4).private


def test_a_stream_never_repeats_itself():
    stream = NoiseStream.repeatable(5)
    assert not np.array_equal(stream.normal(1000), stream.normal(1000))


def test_noise_keeps_shape_and_type():
    like = torch.zeros(3, 5, dtype=torch.float32)
    drawn = normal_like(NoiseStream.repeatable(6), like, deviation=2.0)
    assert drawn.shape == like.shape
    assert drawn.dtype == torch.float32
