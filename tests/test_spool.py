import json

import pytest

from agssd_core.errors import RoundError, WeightsError
from server.spool import RoundSpool
from tests.support.merging import model, moved, update_of

BASE = model(0)


def _spool(folder):
    spool = RoundSpool(folder)
    for index, site in enumerate(("b", "a")):
        update = update_of(moved(BASE, index), site=site)
        spool.add(update, note={"bytes_up": 100 + index})
    return spool


def test_a_reopened_spool_holds_what_was_admitted(tmp_path):
    _spool(tmp_path)
    again = RoundSpool(tmp_path)
    assert again.sites() == ("a", "b")
    assert again.header("a").nonce == "n-a"
    assert again.note("a") == {"bytes_up": 101}
    for index, site in enumerate(("b", "a")):
        for name, array in moved(BASE, index).items():
            found = again.read(site, name)
            assert found.tobytes() == array.tobytes()
            assert found.shape == array.shape
    with pytest.raises(WeightsError):
        again.read("a", "student/unknown")


def test_a_site_stands_once(tmp_path):
    with pytest.raises(RoundError, match="already spooled"):
        _spool(tmp_path).add(update_of(moved(BASE, 5), site="a"))


@pytest.mark.parametrize("site", ["../../escape", "a/b", "..", "ä" * 300, "\ud800"])
def test_a_name_from_outside_never_becomes_a_path(site, tmp_path):
    folder = tmp_path / "deep" / "spool"
    spool = RoundSpool(folder)
    spool.add(update_of(BASE, site=site))
    assert RoundSpool(folder).sites() == (site,)
    assert [p for p in tmp_path.rglob("*.*") if p.parent != folder] == []


@pytest.mark.parametrize("damage", ["flip", "record", "half", "lost"])
def test_what_is_damaged_is_dropped_and_the_rest_kept(damage, tmp_path, caplog):
    _spool(tmp_path)
    record = next(
        r for r in tmp_path.glob("*.json") if '"a"' in json.loads(r.read_text())["header"]
    )
    arrays = record.with_suffix(".safetensors")
    if damage == "flip":
        data = bytearray(arrays.read_bytes())
        data[-1] ^= 1
        arrays.write_bytes(bytes(data))
    elif damage == "record":
        record.write_text("{")
    elif damage == "half":
        record.unlink()  # killed before the record: the arrays alone do not count
    else:
        arrays.unlink()
    again = RoundSpool(tmp_path)
    assert again.sites() == ("b",)
    assert ("damaged" in caplog.text) == (damage != "half")
    again.add(update_of(moved(BASE, 9), site="a"))
    assert RoundSpool(tmp_path).sites() == ("a", "b")


def test_updates_of_another_round_are_dropped_on_resume(tmp_path):
    spool = _spool(tmp_path)
    spool.add(update_of(BASE, site="old", base_digest="older"))
    spool.add(update_of(BASE, site="late", round=2))
    spool.keep_only(run="run-1", round_index=3, base_digest="base")
    assert spool.sites() == RoundSpool(tmp_path).sites() == ("a", "b")
    spool.clear()
    assert spool.sites() == ()
    assert not tmp_path.exists()


@pytest.mark.parametrize("broken", ["server.spool.save_weights", "server.spool.write_text"])
def test_a_full_disk_keeps_the_others(broken, tmp_path, monkeypatch):
    spool = _spool(tmp_path)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, fail)
    with pytest.raises(RoundError, match="already spooled are kept"):
        spool.add(update_of(BASE, site="c"))
    assert RoundSpool(tmp_path).sites() == ("a", "b")
    assert len(list(tmp_path.iterdir())) == 4
