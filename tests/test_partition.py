"""Divisions of a data set: whole patients, nobody twice, the statistics asked for."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.errors import ConfigError
from simulation.datasets.rows import Row, Source
from simulation.partition import partition


def row(scan, patient, *, site="a", modality="CT", vendor="GE", label="x", **more):
    labels = {"class": label}
    source = Source(f"{scan}.nii.gz", "nifti")
    return Row(scan, patient, modality, source, site, vendor, labels=labels, **more)


@st.composite
def data_sets(draw):
    count = draw(st.integers(4, 30))
    return [
        row(
            f"scan{number:03d}",
            f"p{draw(st.integers(0, count - 1))}",
            site=draw(st.sampled_from("abc")),
            modality=draw(st.sampled_from(["CT", "MR"])),
            vendor=draw(st.sampled_from(["GE", "Philips"])),
            label=draw(st.sampled_from("xy")),
        )
        for number in range(count)
    ]


WAYS = ["site", "vendor", "modality", "modality+vendor", "dirichlet:0.5", "quantity:2"]


@settings(max_examples=60, deadline=None)
@given(rows=data_sets(), by=st.sampled_from(WAYS), seed=st.integers(0, 9), random=st.randoms())
def test_no_patient_straddles_and_the_order_of_rows_changes_nothing(rows, by, seed, random):
    drawn = by[0] in "dq"
    sites = 2 if drawn and len({one.patient for one in rows}) > 1 else (1 if drawn else None)
    placed = partition(rows, by=by, sites=sites, seed=seed, folds=3)
    for patient in {item.row.patient for item in placed}:
        own = {(item.site, item.split) for item in placed if item.row.patient == patient}
        assert len(own) == 1
    names = [item.row.scan for item in placed]
    assert len(set(names)) == len(names)
    if by not in ("vendor", "modality", "modality+vendor"):
        assert len(placed) == len(rows)
    shuffled = random.sample(rows, len(rows))
    assert partition(shuffled, by=by, sites=sites, seed=seed, folds=3) == placed


def people(count, label=lambda _: "x"):
    return [row(f"s{n:04d}", f"p{n:04d}", label=label(n)) for n in range(count)]


@pytest.mark.parametrize("alpha", [0.3, 1.0, 10.0])
def test_dirichlet_shares_have_the_mean_and_variance_of_their_concentration(alpha):
    sites, count = 4, 400
    rows = people(count)
    shares = []
    for seed in range(150):
        placed = partition(rows, by=f"dirichlet:{alpha}", sites=sites, seed=seed, folds=0)
        held = Counter(item.site for item in placed)
        shares.append([held[name] / count for name in sorted(held)])
    found = np.array(shares)
    wanted = (1 / sites) * (1 - 1 / sites) / (sites * alpha + 1)
    assert found.mean() == pytest.approx(1 / sites, abs=1e-9)
    assert found.var() == pytest.approx(wanted, rel=0.15)


def test_dirichlet_skews_labels_where_quantity_skews_sizes():
    rows = people(300, label=lambda n: "xy"[n % 2])
    skewed = partition(rows, by="dirichlet:0.1", sites=3, seed=1, folds=0)
    mixed = partition(rows, by="quantity:0.1", sites=3, seed=1, folds=0)

    def purity(placed):
        counts = {}
        for item in placed:
            counts.setdefault(item.site, Counter())[item.row.labels["class"]] += 1
        return sum(max(own.values()) for own in counts.values()) / len(placed)

    assert purity(skewed) > 0.75
    assert purity(mixed) < 0.65


def test_every_site_has_a_patient():
    placed = partition(people(6), by="dirichlet:0.01", sites=5, seed=0, folds=0)
    assert len({item.site for item in placed}) == 5


def test_sites_by_modality_are_pure_and_even():
    rows = [row(f"{p}-{m}", p, modality=m) for p in "abcdefgh" for m in ("CT", "MR")]
    placed = partition(rows, by="modality", folds=0)
    assert all(item.site == item.row.modality for item in placed)
    assert Counter(item.site for item in placed) == {"CT": 4, "MR": 4}


def test_folds_hold_out_everybody_once():
    rows = people(20)
    held = [
        {item.row.patient for item in partition(rows, by="site", folds=5, fold=fold, seed=3)
         if item.split == "test"}
        for fold in range(5)
    ]  # fmt: skip
    assert sorted(p for own in held for p in own) == [one.patient for one in rows]


def test_an_official_test_set_is_the_one_held_out():
    rows = [*people(6), row("official", "q", split="test")]
    placed = partition(rows, by="site", folds=3)
    assert [item.row.patient for item in placed if item.split == "test"] == ["q"]


def test_the_largest_natural_sites_are_kept():
    rows = [row(f"s{n}", f"p{n}", site="abbccc"[n]) for n in range(6)]
    placed = partition(rows, by="site", sites=2, folds=0)
    assert {item.site for item in placed} == {"b", "c"}
    with pytest.raises(ConfigError, match="Ask for fewer"):
        partition(rows, by="site", sites=4)


@pytest.mark.parametrize("by", ["dirichlet", "dirichlet:x", "quantity:-1", "colour"])
def test_impossible_divisions_are_refused(by):
    with pytest.raises(ConfigError, match=r"needs a concentration|is not known"):
        partition(people(4), by=by, sites=2)
