import json

import numpy as np
import pytest

from agssd_core.config import MergeConfig
from agssd_core.errors import UpdateRejectedError
from server.admission import MAX_ABS_VALUE, MAX_METRICS, REASONS, admit
from server.merge import MergeState, merge_round, site_weights
from server.spool import RoundSpool
from tests.support.merging import GROUPS, model, moved, rules_for, update_of, without

NAME = "student/encoder.weight"
TEACHER = "teacher/encoder.weight"


STATEMENT = {
    "epsilon": 2.0,
    "epsilon_run": 1.5,
    "delta": 1e-5,
    "sigma": 1.0,
    "rate": 0.1,
    "steps": 10,
    "unit": "patient",
    "scope": "population",
    "noise": "secure",
    "population": "0123456789abcdef",
    "sequence": 3,
    "digest": "a" * 64,
    "accountant": "rdp opacus 1.6.0",
}
BAD_STATEMENTS = {
    "nan": {"epsilon": float("nan")},
    "infinite": {"epsilon": float("inf")},
    "huge": {"epsilon": 10**400},
    "negative": {"epsilon_run": -1.0},
    "run above all": {"epsilon_run": 3.0},
    "delta": {"delta": 0.0},
    "rate": {"rate": 1.5},
    "unit": {"unit": "volume"},
    "markup": {"accountant": "<b>rdp</b>"},
    "line end": {"population": "0123456789abcdef\n"},
    "sequence": {"sequence": 10**400},
    "text": {"sigma": "1.0"},
    "surplus": {"patients": 12},
}


def _with(weights, name, array):
    return weights | {name: array}


def _poked(weights, value, name=NAME):
    array = weights[name].copy()
    array[0, 0] = value
    return weights | {name: array}


def _bad_updates(good):
    missing = dict(good)
    del missing[NAME]
    return {
        "nan": ("non-finite", update_of(_poked(good, np.nan))),
        "inf": ("non-finite", update_of(_poked(good, -np.inf))),
        "1e30": ("magnitude", update_of(_poked(good, 1e30))),
        "wrong shape": ("schema", update_of(_with(good, NAME, np.zeros((5, 4), np.float32)))),
        "broadcast": ("schema", update_of(_with(good, NAME, np.zeros((1,), np.float32)))),
        "dtype": ("schema", update_of(_with(good, NAME, good[NAME].astype(np.float64)))),
        "missing key": ("schema", update_of(missing)),
        "extra key": ("schema", update_of(_with(good, "student/x", np.zeros(1, np.float32)))),
        "negative weight": ("weight", update_of(good, patient_count=-5)),
        "zero weight": ("weight", update_of(good, patient_count=0)),
        "1e12 weight": ("weight", update_of(good, patient_count=10**12)),
        "replayed round": ("round", update_of(good, round=2)),
        "other run": ("run", update_of(good, run="run-2")),
        "other base": ("base", update_of(good, base_digest="older")),
        "other order": ("nonce", update_of(good, nonce="n-b")),
        "other cohort": ("cohort", update_of(good, cohort="us")),
        "other protocol": ("protocol", update_of(good, protocol=99)),
        "other steps": ("steps", update_of(good, steps=1)),
        "other wire": ("wire", update_of(good, wire="bf16")),
        "altered arrays": ("digest", update_of(good, weights_digest="0" * 64)),
        "other schema digest": ("schema", update_of(good, schema_digest="0" * 64)),
        "metric nan": ("metrics", update_of(good, metrics={"loss": float("nan")})),
        "metric inf": ("metrics", update_of(good, metrics={"loss": float("inf")})),
        "metric huge": ("metrics", update_of(good, metrics={"loss": 10**400})),
        "metric text": ("metrics", update_of(good, metrics={"loss": "<b>"})),
        "metric bool": ("metrics", update_of(good, metrics={"loss": True})),
        "metric name": ("metrics", update_of(good, metrics={"<script>": 1.0})),
        "metrics many": (
            "metrics",
            update_of(good, metrics={f"m{i}": 1.0 for i in range(MAX_METRICS + 1)}),
        ),
        **{
            f"privacy {name}": ("privacy", update_of(good, privacy=STATEMENT | changes))
            for name, changes in BAD_STATEMENTS.items()
        },
        "privacy of no kind": ("privacy", update_of(good, privacy={"epsilon": 1.0})),
        "unknown site": ("site", update_of(good, site="mallory")),
        "too large": ("size", update_of(_with(good, "student/x", np.zeros(99999)))),
    }


BASE = model(0)
BAD = _bad_updates(moved(BASE, 1))


def test_a_good_update_passes_unchanged():
    update = update_of(moved(BASE, 1))
    assert admit(update, rules_for(BASE)) is update
    private = update_of(moved(BASE, 1), privacy=STATEMENT)
    assert admit(private, rules_for(BASE)) is private


@pytest.mark.parametrize("case", BAD)
def test_a_bad_update_is_refused_by_name_and_moves_nobody_else(case, tmp_path):
    reason, bad = BAD[case]
    rules = rules_for(BASE)
    others = {
        "b": update_of(moved(BASE, 2), site="b", nonce="n-b", patient_count=5),
    }

    def merged(updates, folder):
        spool = RoundSpool(folder)
        refused = []
        for update in updates:
            try:
                spool.add(admit(update, rules, admitted=spool.sites()))
            except UpdateRejectedError as error:
                refused.append(error)
        counts = {site: rules.enrolled[site] for site in spool.sites()}
        result = merge_round(
            BASE,
            spool,
            merge=MergeConfig(),
            shares=site_weights(counts, weighting="patients", cap=0.4),
            ema_product=0.9,
            state=MergeState(),
        )
        return result.weights, refused

    absent, nobody = merged([others["b"]], tmp_path / "absent")
    there, refused = merged([bad, others["b"]], tmp_path / "there")
    assert nobody == []
    assert [error.reason for error in refused] == [reason]
    assert reason in REASONS
    assert REASONS[reason] in str(refused[0])
    for name in BASE:
        assert there[name].tobytes() == absent[name].tobytes()


def test_a_second_update_of_a_site_is_a_duplicate():
    update = update_of(moved(BASE, 1))
    with pytest.raises(UpdateRejectedError, match="already admitted") as caught:
        admit(update, rules_for(BASE), admitted=("a",))
    assert caught.value.reason == "duplicate"
    assert caught.value.site == "a"


def test_an_enrolled_site_that_was_not_asked_is_refused():
    rules = rules_for(BASE, nonces={"b": "n-b"})
    with pytest.raises(UpdateRejectedError, match="was not asked"):
        admit(update_of(moved(BASE, 1)), rules)


@pytest.mark.parametrize("name", [NAME, TEACHER])
def test_student_and_teacher_have_each_their_own_norm_limit(name):
    # The teacher is scaled so that its excess is lost in the norm of the whole.
    small = {n: a * np.float32(1e-3) for n, a in BASE.items() if n.startswith("teacher/")}
    base = BASE | small
    near, far = moved(base, 1, scale=1e-6), base | {name: base[name] * np.float32(1.6)}
    rules = rules_for(base, max_update_norm=0.3)
    admit(update_of(near), rules)
    with pytest.raises(UpdateRejectedError, match=f"{name.split('/')[0]} moved by") as caught:
        admit(update_of(far), rules)
    assert caught.value.reason == "norm"


def test_without_a_norm_limit_the_absolute_one_still_holds():
    admit(update_of(_poked(BASE, MAX_ABS_VALUE)), rules_for(BASE))
    with pytest.raises(UpdateRejectedError, match="limit 1e"):
        admit(update_of(_poked(BASE, 2 * MAX_ABS_VALUE)), rules_for(BASE))


def test_a_teacher_is_refused_where_teachers_are_not_averaged():
    groups = MergeConfig(student="median").uploaded_groups
    rules = rules_for(BASE, groups=groups)
    admit(update_of(without(moved(BASE, 1), "teacher")), rules)
    with pytest.raises(UpdateRejectedError, match="surplus"):
        admit(update_of(moved(BASE, 1)), rules)
    assert MergeConfig().uploaded_groups == GROUPS


def test_a_site_name_cannot_write_into_the_log():
    update = update_of(moved(BASE, 1), site="a\n2026 ERROR <b>" + "x" * 500)
    with pytest.raises(UpdateRejectedError, match="not enrolled") as caught:
        admit(update, rules_for(BASE))
    assert "\n" not in str(caught.value)
    assert len(caught.value.site) <= 40


def test_the_byte_cap_may_be_set():
    with pytest.raises(UpdateRejectedError, match="cap 100"):
        admit(update_of(moved(BASE, 1)), rules_for(BASE, max_bytes=100))
    assert rules_for(BASE).byte_cap() < 2**17


@pytest.mark.parametrize("flipped", range(0, 400, 7))
def test_a_flipped_bit_in_the_arrays_is_refused(flipped):
    """Reliability row 5: the digest catches what still looks like weights."""
    update = update_of(moved(BASE, 1))
    names = sorted(update.weights)
    name = names[flipped % len(names)]
    damaged = bytearray(update.weights[name].tobytes())
    damaged[flipped % len(damaged)] ^= 1 << (flipped % 8)
    update.weights[name] = np.frombuffer(bytes(damaged), np.float32).reshape(
        update.weights[name].shape
    )
    with pytest.raises(UpdateRejectedError) as caught:
        admit(update, rules_for(BASE))
    assert caught.value.reason in ("digest", "non-finite", "magnitude")


def test_reasons_are_plain_words():
    assert json.dumps(sorted(REASONS))
    assert set(REASONS) == {reason for reason, _ in BAD.values()} | {
        "duplicate",
        "norm",
        "signature",
    }
