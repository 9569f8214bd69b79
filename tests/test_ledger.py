"""The privacy ledger of a site: what is spent stays spent."""

import json
import os
from dataclasses import replace

import pytest

from agssd_core.accounting import Spending, epsilon
from agssd_core.errors import BudgetError, LedgerError
from agssd_core.signing import SigningKey
from client import ledger as ledger_module
from client.budget import Limit
from client.ledger import FILE, KEY, Ledger, LedgerPlace, Purpose

POPULATION = "0123456789abcdef"
ROUND = Spending(1.0, 0.1, 4)
DELTA = 1e-5


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def place(tmp_path):
    return LedgerPlace.of_site(tmp_path)


def _ledger(place):
    return Ledger(place, site="north", population=POPULATION)


def _reserve(place, number=0, *, run="run-1", limits=(), **more):
    purpose = Purpose(run, number, "p" * 64)
    return _ledger(place).reserve(ROUND, purpose, limits=limits, delta=DELTA, **more)


def _spent(place):
    return epsilon(_ledger(place).read().history(), delta=DELTA)


def test_runs_on_the_same_patients_add_up(place):
    first = _reserve(place, run="run-1")
    second = _reserve(place, run="run-2")
    assert first.epsilon_after == pytest.approx(epsilon([ROUND], delta=DELTA))
    assert second.epsilon_after == pytest.approx(epsilon([ROUND, ROUND], delta=DELTA))
    assert _ledger(place).read().history(run="run-2") == (ROUND,)


def test_a_commitment_spends_nothing_more_and_a_missing_one_nothing_less(place):
    entry = _reserve(place)
    before = _spent(place)
    assert _ledger(place).read().open_reservations() == 1
    _ledger(place).commit(entry)
    chain = _ledger(place).read()
    assert (_spent(place), chain.open_reservations()) == (before, 0)
    _ledger(place).commit(entry)
    with pytest.raises(LedgerError, match="settles no reservation"):
        _ledger(place).read()


def test_a_budget_is_never_passed_and_the_refusal_says_by_how_much(place):
    budget = epsilon([ROUND, ROUND], delta=DELTA) + 0.01
    limits = [Limit("site", budget, DELTA), Limit("plan", 100.0, DELTA)]
    for number in range(2):
        _reserve(place, number, limits=limits)
    spent = _spent(place)
    with pytest.raises(BudgetError) as refused:
        _reserve(place, 2, limits=limits)
    planned = epsilon([ROUND] * 3, delta=DELTA)
    for number in (f"{spent:.4g}", f"{planned:.4g}", f"{budget:g}", "the site"):
        assert number in str(refused.value)
    assert _spent(place) == spent
    _reserve(place, 2, limits=limits[1:])  # the plan's own is wide enough


def _lines(place):
    return (place.folder / FILE).read_bytes().splitlines(keepends=True)


def _edit(change):
    def damage(place):
        lines = _lines(place)
        content = json.loads(lines[1])
        content.update(change)
        form = json.dumps(content, sort_keys=True, separators=(",", ":"))
        (place.folder / FILE).write_bytes(lines[0] + form.encode() + b"\n" + b"".join(lines[2:]))

    return damage


def _keep(chosen):
    def damage(place):
        lines = _lines(place)
        (place.folder / FILE).write_bytes(b"".join(lines[index] for index in chosen))

    return damage


def _forge(place):
    """Somebody with another key signs a cheaper history."""
    key = SigningKey.create()
    (place.folder / KEY).unlink()
    key.save(place.folder / KEY)


DAMAGE = {
    "edited-sigma": _edit({"sigma": 50.0}),
    "edited-steps": _edit({"steps": 1}),
    "reserved-made-committed": _edit({"state": "committed", "settles": 1}),
    "first-removed": _keep([1, 2]),
    "middle-removed": _keep([0, 2]),
    "moved": _keep([1, 0, 2]),
    "repeated": _keep([0, 1, 1, 2]),
    "last-removed": _keep([0, 1]),
    "emptied": _keep([]),
    "deleted": lambda place: (place.folder / FILE).unlink(),
    "other-key": _forge,
    "no-key": lambda place: (place.folder / KEY).unlink(),
    "garbage": lambda place: (place.folder / FILE).write_bytes(b"\0" * 40 + b"\n"),
    "marker": lambda place: place.marker.write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_ledger_pays_for_nothing(place, damage):
    for number in range(3):
        _reserve(place, number)
    damage(place)
    with pytest.raises(LedgerError, match=r"Restore|remove it"):
        _reserve(place, 3)
    with pytest.raises(LedgerError):
        _ledger(place).read()


def test_a_rolled_back_folder_is_noticed_by_the_head_that_the_server_holds(place):
    _reserve(place, 0)
    backup = (place.folder / FILE).read_bytes(), place.marker.read_bytes()
    _reserve(place, 1)
    seen = _ledger(place).read().head
    (place.folder / FILE).write_bytes(backup[0])
    place.marker.write_bytes(backup[1])
    with pytest.raises(LedgerError, match="ends at entry 1, but the server has seen entry 2"):
        _reserve(place, 1, seen=seen)
    _reserve(place, 1)  # nobody to tell: another history begins
    with pytest.raises(LedgerError, match="rewritten"):
        _reserve(place, 2, seen=seen)
    _reserve(place, 2, seen=_ledger(place).read().head)


def test_a_torn_tail_is_set_aside_only_if_it_never_was_an_entry(place, monkeypatch):
    _reserve(place, 0)
    before = (place.folder / FILE).read_bytes(), place.marker.read_bytes()
    _reserve(place, 1)
    after = (place.folder / FILE).read_bytes(), place.marker.read_bytes()
    spent = epsilon([ROUND], delta=DELTA)
    for cut in range(len(before[0]) + 1, len(after[0]), 7):
        (place.folder / FILE).write_bytes(after[0][:cut])
        # The writer was killed in the line: the reservation never returned.
        place.marker.write_bytes(before[1])
        assert _spent(place) == pytest.approx(spent)
        assert _reserve(place, 1).sequence == 2
        assert (place.folder / "ledger.torn-2").read_bytes() == after[0][len(before[0]) : cut]
        # The line had been whole: somebody cut it.
        (place.folder / FILE).write_bytes(after[0][:cut])
        place.marker.write_bytes(after[1])
        with pytest.raises(LedgerError, match="cut or rolled back"):
            _reserve(place, 1)
    # Killed between the line and the marker: too much is counted, never too little.
    (place.folder / FILE).write_bytes(after[0])
    place.marker.write_bytes(before[1])
    assert _reserve(place, 1).epsilon_after == pytest.approx(epsilon([ROUND] * 3, delta=DELTA))


def test_a_full_disk_pays_for_nothing(place, monkeypatch):
    _reserve(place, 0)
    whole = (place.folder / FILE).read_bytes()
    written = os.pwrite

    def full(descriptor, data, offset):
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return written(descriptor, data[:50], offset)

    monkeypatch.setattr(ledger_module.os, "pwrite", lambda d, data, o: full(d, data[:99], o))
    with pytest.raises(LedgerError, match="Free disk space"):
        _reserve(place, 1)
    assert (place.folder / FILE).read_bytes() == whole


def test_other_patients_have_another_ledger(place):
    _reserve(place)
    other = Ledger(place, site="north", population="f" * 16)
    with pytest.raises(LedgerError, match="another population"):
        other.read()


def test_files_are_private_and_name_no_patient(place):
    entry = _reserve(place)
    for name in (FILE, KEY):
        assert (place.folder / name).stat().st_mode & 0o077 == 0
    assert set(json.loads(entry.line())) == set(replace(entry).__dict__)
