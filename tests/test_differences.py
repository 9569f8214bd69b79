"""Coded differences: what they lose is known, kept, and given out later."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agssd_core.differences import (
    BLOCK,
    decode,
    encode,
    pack_whole,
    size_limit,
    unpack_whole,
)
from agssd_core.errors import WeightsError
from agssd_core.weights import schema_of, weights_digest, weights_to_bytes
from tests.support.merging import model, moved, without

CODED = pytest.mark.parametrize("wire", ["bf16", "int8"])
NAME = "student/encoder.weight"
numbers = st.floats(-(2.0**99), 2.0**99, width=32)


def vector(values):
    return {"student/w": np.asarray(values, np.float32)}


@settings(deadline=None, max_examples=50)
@given(values=hnp.arrays(np.float32, st.integers(1, 3 * BLOCK + 1), elements=numbers))
def test_bf16_is_torchs_rounding_to_nearest_even(values):
    zero = vector(np.zeros_like(values))
    reached = encode(zero, vector(values), residual={}, wire="bf16").reached["student/w"]
    expected = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    assert np.array_equal(reached, expected)


@settings(deadline=None, max_examples=50)
@given(values=hnp.arrays(np.float32, st.integers(1, 3 * BLOCK + 1), elements=numbers))
def test_int8_errs_by_half_a_step_of_its_block(values):
    zero = vector(np.zeros_like(values))
    reached = encode(zero, vector(values), residual={}, wire="int8").reached["student/w"]
    for start in range(0, values.size, BLOCK):
        part = slice(start, start + BLOCK)
        step = float(np.abs(values[part]).max()) / 127
        error = np.abs(reached[part].astype(np.float64) - values[part]).max()
        assert error <= 0.5001 * step + 1e-44


@CODED
@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 99))
def test_whoever_decodes_ends_on_the_bits_that_the_coder_says(wire, seed):
    base = model(seed)
    coded = encode(base, moved(base, seed + 1), residual=model(seed + 2, scale=1e-3), wire=wire)
    assert weights_digest(decode(coded.payload, base, wire=wire)) == weights_digest(coded.reached)
    assert schema_of(coded.reached) == schema_of(base)


@CODED
def test_error_feedback_loses_nothing_over_the_rounds(wire):
    """Twenty small steps: what was reached and the residual add up to what was wanted."""
    base = model(0)
    reached, exact, residual = base, {n: a.astype(np.float64) for n, a in base.items()}, {}
    without_feedback = base
    for number in range(20):
        step = model(50 + number, scale=1e-2)
        exact = {n: exact[n] + step[n] for n in exact}
        wanted = {n: np.asarray(reached[n] + step[n], np.float32) for n in reached}
        coded = encode(reached, wanted, residual=residual, wire=wire)
        reached, residual = coded.reached, coded.residual
        plain = {n: np.asarray(without_feedback[n] + step[n], np.float32) for n in exact}
        without_feedback = encode(without_feedback, plain, residual={}, wire=wire).reached
    for name in exact:
        total = reached[name].astype(np.float64) + residual[name]
        np.testing.assert_allclose(total, exact[name], atol=2e-5)
    far = np.abs(without_feedback[NAME] - exact[NAME]).max()
    assert np.abs(reached[NAME] - exact[NAME]).max() < far / 1.5


@CODED
def test_no_difference_moves_nothing(wire):
    base = model(0)
    coded = encode(base, base, residual={}, wire=wire)
    assert weights_digest(coded.reached) == weights_digest(base)
    assert not any(array.any() for array in coded.residual.values())


def test_a_difference_too_small_for_a_scale_waits_in_the_residual():
    tiny = np.float32(1e-45)
    coded = encode(vector([0.0]), vector([tiny]), residual={}, wire="int8")
    assert coded.reached["student/w"][0] == 0
    assert coded.residual["student/w"][0] == tiny


@CODED
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_a_difference_that_is_not_finite_is_not_coded(wire, value):
    base = model(0)
    bad = base | {NAME: np.full((4, 5), value, np.float32)}
    with pytest.raises(WeightsError, match="not finite"):
        encode(base, bad, residual={}, wire=wire)


def test_a_difference_beyond_bf16_is_not_coded():
    with pytest.raises(WeightsError, match="too large for bf16"):
        encode(vector([0.0]), vector([np.finfo(np.float32).max]), residual={}, wire="bf16")


@CODED
def test_fewer_groups_than_the_base_has_may_be_coded(wire):
    base = model(0)
    coded = encode(base, without(moved(base, 1), "teacher"), residual={}, wire=wire)
    assert sorted(coded.payload) == ["state", "student"]
    assert not [n for n in decode(coded.payload, base, wire=wire) if n.startswith("teacher")]


@pytest.mark.parametrize("wire", ["float32", "bf16", "int8"])
def test_an_honest_payload_is_within_its_limit_and_the_limit_is_near(wire):
    rng = np.random.default_rng(0)
    base = {f"student/{i}.weight": rng.standard_normal((64, 65)).astype(np.float32) for i in "abc"}
    base |= {"student/bias": np.zeros(7, np.float32), "state/one": np.float32(1).reshape(())}
    if wire == "float32":
        payload = pack_whole(base)
    else:
        payload = encode(base, base, residual={}, wire=wire).payload
    size = sum(len(part) for part in payload.values())
    assert size <= size_limit(schema_of(base), wire) <= size + 2000


CODES = {"codes": np.zeros(20, np.int8), "scales": np.ones(1, np.float32)}
ODD = [
    {"codes": CODES["codes"]},
    CODES | {"more": np.zeros(1, np.int8)},
    CODES | {"codes": np.zeros(21, np.int8)},
    CODES | {"codes": np.zeros(20, np.uint8)},
    CODES | {"codes": np.zeros((20, 1), np.int8)},
    CODES | {"scales": np.ones(2, np.float32)},
    CODES | {"scales": np.ones(1, np.float64)},
]


@pytest.mark.parametrize("arrays", ODD, ids=range(len(ODD)))
def test_a_payload_of_another_form_is_refused(arrays):
    base = {NAME: np.zeros((4, 5), np.float32)}
    assert decode({"student": weights_to_bytes(CODES)}, base, wire="int8")
    with pytest.raises(WeightsError, match="does not fit the base"):
        decode({"student": weights_to_bytes(arrays)}, base, wire="int8")
    with pytest.raises(WeightsError, match="does not fit the base"):
        decode({"student": weights_to_bytes(arrays)}, base, wire="bf16")
    with pytest.raises(WeightsError, match="not safetensors"):
        decode({"student": b"\x80\x04N."}, base, wire="int8")


@pytest.mark.parametrize("scale", [np.nan, np.inf], ids=str)
def test_a_hostile_scale_gives_weights_that_admission_refuses(scale):
    base = {NAME: np.zeros((4, 5), np.float32)}
    arrays = CODES | {"scales": np.full(1, scale, np.float32)}
    weights = decode({"student": weights_to_bytes(arrays)}, base, wire="int8")
    assert not np.isfinite(weights[NAME]).all()


def test_whole_weights_come_back_as_they_were():
    base = model(0)
    assert weights_digest(unpack_whole(pack_whole(base))) == weights_digest(base)
