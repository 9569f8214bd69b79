"""The simulation's page: the coordinator's page plus pictures of the sites' volumes."""

import re

import pytest

from agssd_core.config import dump_config, parse_config
from agssd_core.training.build import build_model
from server.manifest import RoundRecord
from server.store import RunStore
from simulation.report import write_report
from tests.support.sites import FAST, make_site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return make_site(tmp_path_factory.mktemp("sites") / "north", patients=2)


@pytest.fixture
def config():
    plain = {"preset": "tiny", "training": {"batch_size": 2}, "data": FAST.model_dump()}
    return parse_config(plain)


def save_checkpoint(folder, config):
    weights = build_model(config.agssd, seed=0).shared_weights()
    record = RoundRecord("run", 3, "ct-mr", dump_config(config))
    RunStore(folder).save_round(record, weights)


def test_each_volume_has_its_four_pictures_in_the_page_and_beside_it(tmp_path, site, config):
    save_checkpoint(tmp_path, config)
    page = write_report(tmp_path, sites={"north": site}, config=config).read_text()
    images = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]+)"', page)
    assert len(images) == 8
    assert all(text.startswith("north, Volume ") for text in images)
    assert len(list((tmp_path / "pictures").glob("north-*.png"))) == 8
    assert "first step of round 3" in page
    assert "<script" not in page


def test_a_site_that_cannot_be_opened_is_named_and_the_others_are_shown(tmp_path, site, config):
    save_checkpoint(tmp_path, config)
    sites = {"north": site, "gone": tmp_path / "nothing"}
    page = write_report(tmp_path, sites=sites, config=config).read_text()
    assert "No pictures: " in page
    assert page.count("data:image/png") == 8


def test_a_run_without_a_checkpoint_still_gets_its_page(tmp_path, site, config):
    page = write_report(tmp_path, sites={"north": site}, config=config).read_text()
    assert "There is no checkpoint to show pictures of." in page
    assert "No round has been completed yet." in page


def test_pictures_of_an_earlier_page_are_removed(tmp_path, site, config):
    save_checkpoint(tmp_path, config)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "old-1-pair.png").write_bytes(b"")
    write_report(tmp_path, sites={"north": site}, config=config)
    assert not (tmp_path / "pictures" / "old-1-pair.png").exists()


def test_the_same_run_gives_the_same_pictures(tmp_path, site, config):
    save_checkpoint(tmp_path, config)
    pages = [write_report(tmp_path, sites={"north": site}, config=config).read_text()]
    pages.append(write_report(tmp_path, sites={"north": site}, config=config).read_text())
    assert pages[0] == pages[1]
