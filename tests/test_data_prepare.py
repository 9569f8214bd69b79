"""Preparing and reading back: exactness, damage, interruption, and scans that cannot be used."""

import concurrent.futures
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
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.config.data import DataConfig
from agssd_core.data import prepare as prepare_module
from agssd_core.data.cache import SiteVolumes
from agssd_core.data.cache_file import cache_folder, data_stamp
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.index import index_folders
from agssd_core.data.nifti import read_nifti
from agssd_core.data.prepare import CHANGED, prepare_site
from agssd_core.data.preprocess import preprocess
from agssd_core.errors import CacheError, CatalogueError, ShapeError
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


def test_the_cache_holds_what_preprocessing_gave(shared_site, volumes):
    assert [info.volume for info in volumes.infos] == sorted(info.volume for info in volumes.infos)
    raw = shared_site.with_name("site-raw")
    expected = {}
    for file in raw.rglob("*.nii.gz"):
        modality = file.name[:2]
        prepared = preprocess(read_nifti(file, modality=modality), FAST)
        expected[prepared.array.tobytes()] = prepared
    assert len(volumes) == len(expected) == 4
    for index, info in enumerate(volumes.infos):
        found = np.rint(_whole(volumes, index) * 65535).astype(np.uint16)
        prepared = expected.pop(found.tobytes())
        np.testing.assert_array_equal(info.affine, prepared.affine)
        assert info.foreground_start == prepared.foreground_start
        assert info.foreground_integral[-1, -1, -1] == prepared.mask.sum()


def test_values_lie_in_the_unit_interval(volumes):
    for index in range(len(volumes)):
        values = _whole(volumes, index)
        assert values.dtype == np.float32
        assert values.min() == 0.0
        assert 0.5 < values.max() <= 1.0


@settings(max_examples=60, deadline=None)
@given(
    start=st.tuples(*[st.integers(-50, 60)] * 3),
    size=st.tuples(*[st.integers(1, 50)] * 3),
    index=st.integers(0, 3),
)
def test_a_crop_is_the_volume_with_its_edge_repeated(volumes, start, size, index):
    whole = _whole(volumes, index)
    places = [
        np.clip(np.arange(first, first + side), 0, extent - 1)
        for first, side, extent in zip(start, size, whole.shape, strict=True)
    ]
    crop = volumes.read_crop(index, start, size)
    np.testing.assert_array_equal(crop, whole[np.ix_(*places)])


def test_threads_read_the_same_crops_of_one_volume(volumes):
    """blosc2 guards its context; should a later one let two threads in, this meets them."""
    boxes = [((n % 7, n % 5, n % 3), (30, 30, 30)) for n in range(400)]
    serial = [volumes.read_crop(0, *box) for box in boxes]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            threaded = list(pool.map(lambda box: volumes.read_crop(0, *box), boxes))
    finally:
        sys.setswitchinterval(interval)
    for one, other in zip(serial, threaded, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_empty_crop_is_refused(volumes):
    with pytest.raises(ShapeError, match="Ask for 1 or more"):
        volumes.read_crop(0, (0, 0, 0), (4, 0, 4))


def test_patients_can_be_kept_apart(volumes):
    one = volumes.infos[0].patient
    kept = volumes.keep(frozenset({one}))
    assert len(kept) == 2
    assert {info.patient for info in kept.infos} == {one}


def test_the_integral_counts_the_body(volumes):
    info = volumes.infos[0]
    mask = np.diff(np.diff(np.diff(info.foreground_integral, axis=0), axis=1), axis=2)
    assert set(np.unique(mask)) == {0, 1}
    assert info.foreground_integral[3, 4, 5] == mask[:3, :4, :5].sum()
    assert mask.shape == tuple(-(-side // info.foreground_step) for side in info.shape)


def test_prepare_does_nothing_twice_and_redoes_other_settings(tmp_path):
    site = make_site(tmp_path / "site", patients=2)
    times = {path: path.stat().st_mtime_ns for path in cache_folder(site).iterdir()}
    report = prepare_site(site, FAST)
    assert (report.prepared, report.unchanged) == (0, 2)
    assert times == {path: path.stat().st_mtime_ns for path in cache_folder(site).iterdir()}
    other = FAST.model_copy(update={"ct_window_hu": (-200.0, 300.0)})
    with pytest.raises(CacheError, match=r"2 of 2 .* Run `agssd-site prepare SITE`"):
        SiteVolumes.open(site, other)
    assert prepare_site(site, other).prepared == 2
    assert len(SiteVolumes.open(site, other)) == 2


def test_every_setting_but_the_folders_and_ultrasound_is_in_the_stamp():
    plain = data_stamp(DataConfig())
    for name in DataConfig.model_fields:
        value = {"sites": {"a": "/x"}, "chunk": 32, "foreground_margin": 3}.get(name)
        value = value or {"frames": {"max_side": 300}}.get(name)
        value = value or {"spacing_mm": (1, 1, 2)}.get(name) or (1.0, 90.0)
        changed = data_stamp(DataConfig(**{name: value}))
        assert (changed == plain) == (name in ("sites", "frames")), name


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
