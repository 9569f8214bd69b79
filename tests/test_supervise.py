"""A site's processes: started once, and again when they end."""

import os
import sys
import time

import pytest

from agssd_core.errors import KeyFileError
from agssd_core.folders import folder_lock
from client import supervise
from client.supervise import Part, run_enrolled
from tests.support.enrolled import enrol
from tests.support.sites import make_site


def tended(part, *, until):
    """Tend a part as the site does, with said lines, until something holds."""
    said, ends = [], time.monotonic() + 20
    while not until(said) and time.monotonic() < ends:
        part.tend(said.append)
        time.sleep(0.02)
    return said


def part_of(tmp_path, *code, sign=None):
    command = [sys.executable, "-c", "\n".join(code)]
    return Part("node", command, dict(os.environ), tmp_path / "log", sign=sign)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(supervise, "FIRST_PAUSE_S", 0.1)


def test_a_node_that_is_never_let_in_waits_longer_and_longer(tmp_path):
    part = part_of(tmp_path, "raise SystemExit(1)", sign=tmp_path / "id")
    part.pause_s = 0.1
    tended(part, until=lambda said: len(said) == 3)
    assert part.pause_s == pytest.approx(0.8)


def test_a_node_that_was_let_in_starts_again_at_once(tmp_path):
    """A coordinator that is started again finds its sites soon, however often it happens."""
    sign = tmp_path / "id"
    code = (
        "import time, pathlib",
        f"place = pathlib.Path({str(sign)!r})",
        "place.write_text('1'); time.sleep(0.5); place.unlink()",
    )
    part = part_of(tmp_path, *code, sign=sign)
    part.pause_s = 0.1
    tended(part, until=lambda said: len(said) == 3)
    assert part.pause_s == pytest.approx(0.2)


def test_what_an_earlier_process_left_is_no_sign(tmp_path):
    sign = tmp_path / "id"
    sign.write_text("1")
    os.utime(sign, (1, 1))
    part = part_of(tmp_path, "raise SystemExit(1)", sign=sign)
    part.pause_s = 0.1
    tended(part, until=lambda said: len(said) == 3)
    assert part.pause_s == pytest.approx(0.8)


def test_a_site_runs_once(tmp_path):
    """A second one, by hand beside the service, would take the first one's place at the server."""
    site, said = make_site(tmp_path / "north", "CT", seed=1), []
    enrol(site)
    (site / "federation").mkdir(exist_ok=True)
    with (
        folder_lock(site / "federation", name="run.lock"),
        pytest.raises(KeyFileError, match=r"runs already.*Stop that first"),
    ):
        run_enrolled(site, say=said.append)
    assert said == []
