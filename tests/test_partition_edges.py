"""Divisions at their edges: sites of like names, hidden answers, folds, faulty rows."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.config.node import name_problem
from agssd_core.errors import ConfigError, DataError
from simulation.datasets.rows import Mask, Row, Source
from simulation.partition import partition, site_names

MASK = Mask(Source("m.nii", "nifti"))


def person(number, **more):
    return Row(f"s{number:03d}", f"p{number:03d}", "CT", Source(f"{number}.nii", "nifti"), **more)


@settings(max_examples=200)
@given(texts=st.sets(st.text(max_size=60), max_size=12))
def test_two_hospitals_never_become_one_site(texts):
    names = site_names(texts)
    assert len({name.casefold() for name in names.values()}) == len(texts)
    assert not any(name_problem(name) for name in names.values())
    assert site_names(sorted(texts)[:1]) == {
        text: site_names([text])[text] for text in sorted(texts)[:1]
    }


def test_hospitals_whose_names_differ_by_an_accent_stay_apart():
    rows = [person(n, site=("Zürich", "Zérich")[n % 2]) for n in range(8)]
    assert len({item.site for item in partition(rows, by="site")}) == 2


def test_where_official_answers_are_hidden_a_fold_is_held_out_beside_them():
    rows = [person(n, masks=(MASK,), split="train") for n in range(10)]
    hidden = [person(n, split="test") for n in range(10, 14)]
    placed = partition([*rows, *hidden], by="site", folds=5)
    held = [item.row for item in placed if item.split == "test"]
    assert sum(bool(row.masks) for row in held) == 2
    assert {row.scan for row in hidden} <= {row.scan for row in held}
    told = [replace(row, masks=(MASK,)) for row in hidden]
    known = partition([*rows, *told], by="site", folds=5)
    assert {item.row.scan for item in known if item.split == "test"} == {r.scan for r in hidden}


def test_the_official_split_may_be_left_aside():
    rows = [person(n, split="test" if n < 5 else "train") for n in range(10)]
    placed = partition(rows, by="site", folds=5, official=False)
    held = Counter(item.row.split for item in placed if item.split == "test")
    assert held.total() == 2
    fold = {
        item.row.scan
        for number in range(5)
        for item in partition(rows, by="site", folds=5, fold=number, official=False)
        if item.split == "test"
    }
    assert len(fold) == 10


def test_an_official_test_set_at_left_out_sites_holds_nobody_in():
    rows = [person(n, site="big") for n in range(8)]
    rows.append(person(9, site="small", split="test"))
    placed = partition(rows, by="site", sites=1, folds=4)
    assert Counter(item.split for item in placed) == {"train": 6, "test": 2}


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), folds=st.integers(2, 6))
def test_every_site_trains_and_tests_where_it_has_two_patients(sizes, folds):
    rows = [
        Row(f"{site}-{n}", f"{site}-{n}", "CT", Source("x", "nifti"), site=str(site))
        for site, size in enumerate(sizes)
        for n in range(size)
    ]
    for fold in range(folds):
        sides = {}
        for item in partition(rows, by="site", folds=folds, fold=fold):
            sides.setdefault(item.site, Counter())[item.split] += 1
        for site, size in enumerate(sizes):
            found = sides[str(site)]
            assert found["train"] >= 1
            assert (found["test"] >= 1) == (size > 1)


def test_classes_are_held_out_alike():
    rows = [person(n, labels={"class": "ab"[n < 15]}) for n in range(60)]
    for fold in range(5):
        placed = partition(rows, by="site", folds=5, fold=fold)
        held = Counter(item.row.labels["class"] for item in placed if item.split == "test")
        assert held == {"b": 3, "a": 9}


def test_quantity_shares_have_the_variance_of_their_concentration():
    sites, count, alpha = 5, 500, 2.0
    rows = [person(n) for n in range(count)]
    shares = np.array([
        sorted(Counter(i.site for i in partition(rows, by=f"quantity:{alpha}", sites=sites,
                                                 seed=seed, folds=0)).items())
        for seed in range(150)
    ])[:, :, 1].astype(float) / count  # fmt: skip
    assert shares.mean(0) == pytest.approx(1 / sites, abs=0.03)
    wanted = (1 / sites) * (1 - 1 / sites) / (sites * alpha + 1)
    assert shares.var() == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"folds": 1}, "Use two folds or more"),
        ({"folds": 3, "fold": 3}, "Use two folds or more"),
        ({"folds": -1}, "Use two folds or more"),
        ({"sites": 0}, "at least one must be"),
        ({"sites": -1}, "at least one must be"),
        ({"by": "fact:typo"}, "Facts of this data set: centre"),
    ],
    ids=str,
)
def test_impossible_wishes_are_refused(options, match):
    rows = [person(n, facts={"centre": "1"}) for n in range(6)]
    with pytest.raises(ConfigError, match=match):
        partition(rows, **{"by": "site", **options})


def test_rows_without_a_name_or_with_one_name_are_refused():
    with pytest.raises(DataError, match=r"1 scan\(s\) stand twice"):
        partition([person(1), person(1)], by="site")
    with pytest.raises(DataError, match="1 have no name or patient"):
        partition([replace(person(1), patient="")], by="site")
