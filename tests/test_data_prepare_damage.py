"""Prepared scans: damage, interruption, full disks and scans that cannot be used."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from agssd_core.data import prepare as prepare_module
from agssd_core.data.cache import SiteVolumes
from agssd_core.data.cache_file import cache_folder
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.index import index_folders
from agssd_core.data.prepare import CHANGED, prepare_site
from agssd_core.errors import CacheError, CatalogueError
from tests.support.crashing import crash_on_mr, wait_until_gone
from tests.support.sites import FAST, make_raw_site, make_site


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory):
    return make_site(tmp_path_factory.mktemp("prepare") / "site", ("CT", "MR"), patients=2)


@pytest.fixture(scope="module")
def volumes(shared_site):
    return SiteVolumes.open(shared_site, FAST)


def _whole(volumes, index):
    return volumes.read_crop(index, (0, 0, 0), volumes.infos[index].shape)


def test_a_flipped_byte_is_found_and_mended(tmp_path):
    site = make_site(tmp_path / "site", patients=2)
    volumes = SiteVolumes.open(site, FAST)
    whole = _whole(volumes, 1)
    file = cache_folder(site) / f"{volumes.infos[1].volume}.b2nd"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    damaged = SiteVolumes.open(site, FAST)
    assert damaged.read_crop(0, (0, 0, 0), (8, 8, 8)).shape == (8, 8, 8)
    with pytest.raises(CacheError, match=r"agssd-site prepare SITE --verify"):
        damaged.read_crop(1, (0, 0, 0), (8, 8, 8))
    assert prepare_site(site, FAST).prepared == 0
    assert prepare_site(site, FAST, verify=True).prepared == 1
    np.testing.assert_array_equal(_whole(SiteVolumes.open(site, FAST), 1), whole)


@pytest.mark.parametrize("damage", ["cut", "gone", "json"])
def test_a_lost_volume_is_refused_and_made_again(tmp_path, damage):
    site = make_site(tmp_path / "site", patients=2)
    file = sorted(cache_folder(site).glob("*.b2nd"))[0]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "gone":
        file.unlink()
    else:
        file.with_suffix(".json").write_text('{"volume": 3}')
    with pytest.raises(CacheError, match="1 of 2 volume"):
        SiteVolumes.open(site, FAST)
    assert prepare_site(site, FAST).prepared == 1
    assert len(SiteVolumes.open(site, FAST)) == 2


def test_a_killed_run_leaves_nothing_half_written_and_goes_on(tmp_path):
    """With two workers, whose files are those of one, and who do not outlive their parent."""
    site = make_site(tmp_path / "site", patients=6)
    expected = {path.name: path.read_bytes() for path in cache_folder(site).glob("*.b2nd")}
    for path in cache_folder(site).iterdir():
        path.unlink()
    file = tmp_path / "program.py"  # a file: spawned workers import the main program
    file.write_text(SLOW_PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, file, site]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    workers = {int(process.stdout.readline()) for _ in range(2)} - {process.pid}
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert workers
    wait_until_gone(workers)
    ready = len(list(cache_folder(site).glob("*.json")))
    assert 2 <= ready < 6
    (cache_folder(site) / ".left-behind.1.tmp").write_bytes(b"half")
    calls = []
    report = prepare_site(site, FAST, progress=lambda *given: calls.append(given))
    assert (report.prepared, report.unchanged) == (6 - ready, ready)
    assert calls == [(done, 6 - ready) for done in range(1, 7 - ready)]
    names = {path.name for path in cache_folder(site).iterdir()}
    assert names == expected.keys() | {name.replace("b2nd", "json") for name in expected}
    for path in cache_folder(site).glob("*.b2nd"):
        assert path.read_bytes() == expected[path.name]


SLOW_PROGRAM = """
import sys
from pathlib import Path

from agssd_core.data import prepare
from tests.support.crashing import wait_after_two
from tests.support.sites import FAST

if __name__ == "__main__":
    prepare.prepare_one = wait_after_two
    prepare.prepare_site(Path(sys.argv[1]), FAST, workers=2)
"""


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    site = make_site(tmp_path / "site", patients=1)
    for path in cache_folder(site).iterdir():
        path.unlink()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, before[1]))
    try:
        with pytest.raises(CacheError, match="Free disk space"):
            prepare_site(site, FAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(cache_folder(site).iterdir())


def test_changed_and_vanished_sources(tmp_path):
    site = make_site(tmp_path / "site", patients=3)
    raw = tmp_path / "site-raw"
    files = sorted(raw.rglob("*.nii.gz"))
    # What is prepared stays usable when the source is archived away.
    files[0].unlink()
    assert len(SiteVolumes.open(site, FAST)) == 3
    os.utime(files[1], ns=(time.time_ns(), time.time_ns()))
    index_folders(site, [raw])
    with pytest.raises(CacheError, match="1 of 2 volume"):
        SiteVolumes.open(site, FAST)
    os.utime(files[1], ns=(5, 5))
    report = prepare_site(site, FAST)
    assert [item.reason for item in report.skipped] == [CHANGED]
    index_folders(site, [raw])
    assert prepare_site(site, FAST).prepared == 1
    assert len(SiteVolumes.open(site, FAST)) == 2
    assert len(list(cache_folder(site).glob("*.b2nd"))) == 2


def _bad_image(kind):
    rng = np.random.default_rng(0)
    array = rng.normal(0, 200, size=(24, 24, 24)).astype(np.float32)
    affine = np.diag([6.0, 6.0, 6.0, 1.0])
    if kind == "nan":
        array[3, 4, 5] = np.nan
    elif kind == "constant":
        array[:] = 7
    elif kind == "tiny":
        array = array[:, :, :4]
    elif kind == "shifted":
        array = np.abs(array) + 5
    elif kind == "air":
        array = array * 0.1 - 1000
    elif kind == "no contrast":
        array = np.zeros((24, 24, 24), dtype=np.float32)
        array[4:20, 4:20, 4:20] = 100
    return array, affine


@pytest.mark.parametrize(
    ("kind", "modality", "message"),
    [
        ("nan", "CT", r"1 voxel\(s\) are NaN or infinite, none are allowed. Replace them"),
        ("constant", "MR", "same value"),
        ("tiny", "CT", "every side needs 8. Choose a finer data.spacing_mm"),
        ("air", "CT", "no body was found"),
        ("shifted", "CT", "no Hounsfield units"),
        ("no contrast", "MR", "no contrast"),
        ("cut", "CT", "no readable NIfTI"),
    ],
)
def test_unusable_scans_are_listed_and_the_rest_is_prepared(tmp_path, kind, modality, message):
    raw = make_raw_site(tmp_path / "raw", modality, patients=1)
    array, affine = _bad_image(kind)
    bad = raw / f"doe_{modality}.nii.gz"
    nib.save(nib.Nifti1Image(array, affine), bad)
    if kind == "cut":
        bad.write_bytes(bad.read_bytes()[:-2000])
    site = tmp_path / "site"
    index_folders(site, [raw])
    report = prepare_site(site, FAST)
    assert report.ready == 1
    (item,) = report.skipped
    assert re.search(message, item.reason), item.reason
    assert "doe" not in item.reason
    assert len(SiteVolumes.open(site, FAST)) == 1
    again = prepare_site(site, FAST)
    assert (again.prepared, again.unchanged, len(again.skipped)) == (0, 1, 1)


def test_a_site_without_any_usable_scan_is_refused(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    array, affine = _bad_image("tiny")
    nib.save(nib.Nifti1Image(array, affine), raw / "ct_1.nii.gz")
    index_folders(tmp_path / "site", [raw])
    prepare_site(tmp_path / "site", FAST)
    with pytest.raises(CatalogueError, match="agssd-site skipped SITE"):
        SiteVolumes.open(tmp_path / "site", FAST)
    assert open_catalogue(tmp_path / "site").patient_count == 1


def test_a_folder_without_catalogue_is_refused(tmp_path):
    with pytest.raises(CatalogueError, match="agssd-site index DIR --out SITE"):
        SiteVolumes.open(tmp_path, FAST)


def test_a_crashing_decoder_costs_its_own_volume_alone(tmp_path, monkeypatch):
    raw = make_raw_site(tmp_path / "raw", ("CT", "MR"), patients=1)
    site = tmp_path / "site"
    index_folders(site, [raw])
    monkeypatch.setattr(prepare_module, "prepare_one", crash_on_mr)
    report = prepare_site(site, FAST, workers=2)
    assert report.ready == 1
    assert [item.reason for item in report.skipped] == [prepare_module.CRASHED]


def test_where_no_process_can_be_started_the_work_is_done_in_this_one(tmp_path):
    site = tmp_path / "site"
    index_folders(site, [make_raw_site(tmp_path / "raw", "CT", patients=2)])
    program = (
        "from pathlib import Path\n"
        "from agssd_core.data.prepare import prepare_site\n"
        "from tests.support.sites import FAST\n"
        f"print(prepare_site(Path({str(site)!r}), FAST, workers=2).ready)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-"], input=program, text=True, capture_output=True, cwd=root, check=True
    )
    assert done.stdout.split() == ["2"]
