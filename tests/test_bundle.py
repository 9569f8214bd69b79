import json
import os
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from agssd_core.config import PhantomSiteConfig, parse_config
from agssd_core.config.finetune import FinetuneConfig
from agssd_core.config.tasks import TaskConfig
from agssd_core.data.clips import load_clip
from agssd_core.data.nifti import read_nifti
from agssd_core.data.preprocess import preprocess
from agssd_core.evaluation.bundle import MODULES, record_results, scripts, write_bundle
from agssd_core.evaluation.bundle_facts import BundleFacts, BundleItem
from agssd_core.evaluation.bundle_prepare import Preparation
from agssd_core.evaluation.bundle_run import structure_dice
from agssd_core.evaluation.finetune import finetune
from agssd_core.evaluation.metrics import segmentation_outcome
from simulation.phantoms import make_phantom, make_us_clip
from tests.support.labelled import checkpoint, frames, volumes

FAST = FinetuneConfig(steps=8, batch=2, crops=1, learning_rate=3e-3, feature_size=8)
TISSUES = TaskConfig(name="tissues", kind="segmentation", structures=(1, 2))
PARITY = TaskConfig(name="parity", kind="classification", label="parity")
FACTS = BundleFacts("phantoms", "none needed", ("one", "two"), "a phantom run", {"a": 2, "b": 1})


def _config(cohort):
    given = {"preset": "tiny", "data": {"spacing_mm": [6.0] * 3}}
    return parse_config(given | ({"cohorts": ["us"]} if cohort == "us" else {})).for_cohort(cohort)


def _preparation(data):
    return Preparation(
        spacing_mm=data.spacing_mm,
        ct_window_hu=data.ct_window_hu,
        mr_percentiles=data.mr_percentiles,
        max_side=data.frames.max_side,
    )


def _write_ct(folder, number, modality="CT"):
    """A phantom at 5 x 6 x 7 mm, stored from left to right and with axes exchanged."""
    site = PhantomSiteConfig(name="a", size=(48, 40, 32), spacing_mm=(5.0, 6.0, 7.0))
    phantom = make_phantom(site, number, modality, seed=0)
    turned = phantom.affine[:, [1, 0, 2, 3]] @ np.diag([1, -1, 1, 1])
    for name, array in (("ct", phantom.image), ("label", phantom.labels)):
        stored = np.ascontiguousarray(array.transpose(1, 0, 2)[:, ::-1])
        kept = np.where(stored < 3, stored, 0) if name == "label" else stored
        image = nib.Nifti1Image(kept.astype(np.int16), turned)
        nib.save(image, folder / f"{name}{number}.nii.gz")


def _write_us(folder, number):
    site = PhantomSiteConfig(name="u", modalities=("US",), format="png", clips=1)
    clip = make_us_clip(site, number, 0, seed=0)
    Image.fromarray(clip.frames[0]).save(folder / f"us{number}.png")
    labels = np.where(clip.labels[0] < 3, clip.labels[0], 0).astype(np.uint8)
    Image.fromarray(labels).save(folder / f"label{number}.png")


def _bundle(folder, cohort, task):
    config = _config(cohort)
    (folder / "data").mkdir()
    scans = (volumes(folder / "scans", config.data) if cohort != "us"
             else frames(folder / "scans", bright_class=True))  # fmt: skip
    done = finetune(scans, task, checkpoint(config), config, FAST)
    write, stem, modality = (_write_us, "us", "US") if cohort == "us" else (_write_ct, "ct", "CT")
    suffix = ".png" if cohort == "us" else ".nii.gz"
    items = []
    for number in (0, 1):
        write(folder / "data", number)
        label = number if task is PARITY else f"label{number}{suffix}"
        items.append(
            BundleItem(f"scan{number}", f"{stem}{number}{suffix}", label, modality, "ab"[number])
        )
    write_bundle(folder / "bundle", done, task, config.data, items, FACTS)
    return done, config, items


def _run(bundle, *more, cwd):
    """The command of the README, where neither this package nor a network is to be had."""
    blocked = cwd / "blocked" / "agssd_core"
    blocked.mkdir(parents=True, exist_ok=True)
    (blocked / "__init__.py").write_text("raise ImportError('not on the path of a user')")
    environment = {**os.environ, "PYTHONPATH": str(blocked.parent), "OMP_NUM_THREADS": "1"}
    environment |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file",
               str(bundle / "configs" / "inference.json"), *more]  # fmt: skip
    found = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.mark.parametrize("cohort", ["ct-mr", "us"])
def test_a_bundle_segments_offline_and_gives_the_dice_of_this_package(tmp_path, cohort):
    done, config, items = _bundle(tmp_path, cohort, TISSUES)
    out = _run(tmp_path / "bundle", cwd=tmp_path)

    metrics = json.loads((tmp_path / "bundle" / "eval" / "metrics.json").read_text())
    prepare, predictor = _preparation(config.data), done.predictor()
    dice = []
    for item, row in zip(items, metrics["scans"], strict=True):
        ready = prepare(tmp_path / "data" / item.image, item.modality)
        labels = ready.restore(predictor.segment(ready.image))
        file = tmp_path / "data" / item.label
        truth = _pixels(file)
        outcome = segmentation_outcome([labels], [_Site()], [truth], 2)
        dice.append(outcome.metrics["dice"])
        assert row["dice"] == pytest.approx(dice[-1], abs=1e-4)
        written = tmp_path / "bundle" / "eval" / row["prediction"]
        np.testing.assert_array_equal(_pixels(written), labels)
        if cohort != "us":
            image = nib.load(tmp_path / "data" / item.image)
            np.testing.assert_allclose(nib.load(written).affine, image.affine, atol=1e-4)
            assert nib.load(written).shape == image.shape
    assert metrics["mean_dice"] == pytest.approx(np.mean(dice), abs=1e-4)
    assert f"mean_dice {metrics['mean_dice']:.4f}" in out
    assert metrics["failed"] == {}


@pytest.mark.parametrize("cohort", ["ct-mr", "us"])
def test_a_bundle_classifies_offline_as_this_package_does(tmp_path, cohort):
    done, config, items = _bundle(tmp_path, cohort, PARITY)
    _run(tmp_path / "bundle", "--output_dir", str(tmp_path / "answers"), cwd=tmp_path)
    metrics = json.loads((tmp_path / "answers" / "metrics.json").read_text())
    for item, row in zip(items, metrics["scans"], strict=True):
        ready = _preparation(config.data)(tmp_path / "data" / item.image, item.modality)
        shares = done.predictor().classify(ready.image, ready.inside)
        assert [row["p one"], row["p two"]] == pytest.approx(list(shares), abs=1e-5)
    right = [row["prediction"] == row["truth"] for row in metrics["scans"]]
    assert metrics["accuracy"] == np.mean(right)


def test_other_images_without_truth_are_named_on_the_command_line(tmp_path):
    _bundle(tmp_path, "us", TISSUES)
    mine = tmp_path / "mine"
    mine.mkdir()
    _write_us(mine, 7)
    (mine / "blank.png").write_bytes(b"no image")
    items = [{"name": n, "image": f"{n}.png", "modality": "US"} for n in ("us7", "blank")]
    (tmp_path / "my.json").write_text(json.dumps({"test": items}))
    places = {"datalist": tmp_path / "my.json", "dataset_dir": mine, "output_dir": tmp_path / "out"}
    given = [text for name, place in places.items() for text in (f"--{name}", str(place))]
    _run(tmp_path / "bundle", *given, cwd=tmp_path)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["images"], list(metrics["failed"])) == (1, ["blank"])
    assert "mean_dice" not in metrics
    assert (tmp_path / "out" / "predictions" / "us7.png").is_file()


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_volumes_are_prepared_as_for_pretraining(tmp_path, modality):
    data = _config("ct-mr").data
    _write_ct(tmp_path, 0, modality)
    file = tmp_path / "ct0.nii.gz"
    expected = preprocess(read_nifti(file, modality=modality, vendor="other"), data).array
    found = _preparation(data)(file, modality).image
    np.testing.assert_array_equal(np.rint(found * 65535).astype(np.uint16), expected)


def test_stills_are_prepared_as_for_pretraining(tmp_path):
    data = _config("us").data
    _write_us(tmp_path, 0)
    clip = load_clip(tmp_path / "us0.png", "image", data.frames)
    found = _preparation(data)(tmp_path / "us0.png", "US")
    np.testing.assert_array_equal(np.rint(found.image * 255).astype(np.uint8), clip.frames[0])
    np.testing.assert_array_equal(found.inside, clip.sector)


def test_what_is_predicted_of_a_volume_comes_back_to_its_own_voxels(tmp_path):
    """A block of metal, off the middle on every axis, lies where the file has it."""
    data = _config("ct-mr").data
    _write_ct(tmp_path, 3)
    held = nib.load(tmp_path / "ct3.nii.gz")
    raw = np.asarray(held.dataobj).copy()
    raw[8:16, 12:24, 9:15] = 2000
    nib.save(nib.Nifti1Image(raw, held.affine), tmp_path / "metal.nii.gz")
    ready = _preparation(data)(tmp_path / "metal.nii.gz", "CT")
    bright = (ready.image > 0.75).astype(np.float32)
    labels = ready.restore(np.stack([1 - bright, bright]))
    assert labels.shape == raw.shape
    assert structure_dice(labels, (raw > 500).astype(np.uint8), 1)[1] > 0.85


def test_what_is_predicted_of_a_frame_comes_back_to_its_own_pixels(tmp_path):
    """The dark chamber of the left ventricle lies where the screen has it, and nothing outside."""
    _write_us(tmp_path, 3)
    ready = _preparation(_config("us").data)(tmp_path / "us3.png", "US")
    truth = _pixels(tmp_path / "label3.png")
    rows, columns = np.nonzero(truth == 1)
    # Speckle is smoothed away first.
    dark = ((gaussian_filter(ready.image, 2) < 0.25) & ready.inside).astype(np.float32)
    labels = ready.restore(np.stack([1 - dark, dark]))
    assert labels.shape == truth.shape
    box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert structure_dice(labels[box], (truth[box] == 1).astype(np.uint8), 1)[1] > 0.8
    # By the middle of the chamber to a few pixels of a screen that was shrunk by about half.
    middles = [np.mean(np.nonzero(each[box]), axis=1) for each in (labels, truth == 1)]
    assert np.abs(middles[0] - middles[1]).max() < 4
    clip = load_clip(tmp_path / "us3.png", "image", _config("us").data.frames)
    outside = np.ones(truth.shape, bool)
    outside[clip.box[0] :, clip.box[1] :][: clip.box[2], : clip.box[3]] = False
    assert not labels[outside].any()


def test_the_copies_import_nothing_but_each_other_and_known_packages():
    texts = scripts()
    assert len(texts) == len(MODULES)
    for text in texts.values():
        assert not re.search(r"^\s*(from|import) agssd_core", text, re.MULTILINE)
        for name in re.findall(r"^from \.(\w+) import", text, re.MULTILINE):
            assert f"{name}.py" in texts


def test_metadata_says_what_a_reader_needs(tmp_path):
    done, _, _ = _bundle(tmp_path, "us", TISSUES)
    record_results(tmp_path / "bundle", {"mean_dice": 0.5})
    metadata = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    for key in ("version", "changelog", "monai_version", "pytorch_version", "numpy_version",
                "required_packages_version", "task", "description", "authors", "copyright",
                "license", "intended_use"):  # fmt: skip
        assert metadata[key], key
    assert metadata["training_scans"] == {"a": 2, "b": 1}
    assert metadata["eval_metrics"] == {"mean_dice": 0.5}
    shown = metadata["network_data_format"]
    assert shown["inputs"]["image"]["spatial_shape"] == done.build["size"]
    assert shown["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "one", "2": "two"}


def test_weights_are_tensors_alone_and_a_second_bundle_replaces_the_first(tmp_path):
    done, config, items = _bundle(tmp_path, "us", TISSUES)
    file = tmp_path / "bundle" / "models" / "model.pt"
    state = torch.load(file, weights_only=True)
    assert all(torch.equal(state[n], t) for n, t in done.network.state_dict().items())
    first = file.read_bytes()
    (tmp_path / "bundle" / "stale").write_text("of the first")
    write_bundle(tmp_path / "bundle", done, TISSUES, config.data, items, FACTS)
    assert file.read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "data", "scans"]
    assert not (tmp_path / "bundle" / "stale").exists()


def _pixels(file):
    if file.name.endswith(".nii.gz"):
        return np.asarray(nib.load(file).dataobj).astype(np.uint8)
    return np.asarray(Image.open(file))


class _Site:
    site, spacing_mm = "a", None
