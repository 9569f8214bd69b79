"""The site's own page shows its own scans under the run's networks; they stay in its folder."""

import base64
import re

import pytest
from typer.testing import CliRunner

from agssd_core.config import config_from_json
from agssd_core.signing import SigningKey
from client.cli import app
from client.connection import Connection, keys_folder, save_connection
from client.delivered import Signed, store
from client.site_keys import make_keys
from server.delivery import Certified
from server.store import RunStore
from simulation.engines import federate
from tests.support.federated import federated_config, started_run, two_sites

pytestmark = pytest.mark.federation


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two sites after two rounds, and the run's folder."""
    folder = tmp_path_factory.mktemp("pictures")
    sites = two_sites(folder / "sites")
    config = federated_config(folder)
    started_run(config, folder / "run")
    federate(config, sites, folder / "run")
    return sites, folder / "run"


def page_of(site, *options):
    answer = CliRunner().invoke(app, ["report", str(site), *options])
    assert answer.exit_code == 0, answer.output
    file = site / "report.html"
    assert file.stat().st_mode & 0o077 == 0
    return file.read_text()


def pictures(page):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [base64.b64decode(each) for each in found]


def test_the_page_shows_the_sites_scans_and_nobody_else_gets_them(trained):
    sites, run = trained
    page = page_of(sites["north"])
    drawn = pictures(page)
    assert len(drawn) in (4, 8)
    assert all(each.startswith(b"\x89PNG") for each in drawn)
    assert "own after round 1, before merging" in page
    for title in ("Crop pair", "Edges and mask", "Reconstruction", "Patch tokens"):
        assert title in page
    for part in ("<script", 'src="http', "href="):
        assert part not in page
    assert not list(sites["north"].rglob("*.png"))
    for file in run.rglob("*"):
        assert not file.is_file() or b"\x89PNG" not in file.read_bytes()
    assert pictures(page_of(sites["north"], "--no-pictures")) == []


def test_a_delivered_checkpoint_is_what_is_shown(trained):
    sites, run = trained
    site, key = sites["south"], SigningKey.create()
    keys_folder(site).mkdir(mode=0o700)
    make_keys(site, 1)
    pinned = key.public.text()
    save_connection(site, Connection("trial", "south", "127.0.0.1:9", pinned, 1, "2099-01-01"))
    checkpoint = RunStore(run).latest()
    config = config_from_json(checkpoint.manifest.config)
    certified = Certified.of(checkpoint, config, key)
    folder = store(site, Signed(certified.certificate, certified.signature), checkpoint.weights)
    before = page_of(site)
    assert "the final checkpoint, round 2" in before
    assert pictures(before)

    weights = folder / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    page = page_of(site)
    assert "No pictures: " in page
    assert "not those that the coordinator signed" in page
    assert "Total loss" in page


def test_what_cannot_be_drawn_is_said_and_the_curves_are_there(trained):
    sites, _ = trained
    (sites["north"] / "cache").rename(sites["north"] / "away")
    try:
        page = page_of(sites["north"])
    finally:
        (sites["north"] / "away").rename(sites["north"] / "cache")
    assert "No pictures: " in page
    assert "agssd-site prepare" in page
    assert "Total loss" in page
