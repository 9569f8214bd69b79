import json

import nibabel as nib
import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from agssd_core.config import PhantomSiteConfig, parse_config
from agssd_core.console import CommandGroup
from simulation.finetune_cli import finetune
from simulation.partition import Placed
from simulation.phantom_rows import phantom_rows
from simulation.run import initialise
from simulation.sites_csv import write_sites
from simulation.split import Division, write_about

SMALL = {"preset": "tiny", "data": {"spacing_mm": [6.0] * 3}}
QUICK = ["--steps", "3", "--set", "batch=1", "--set", "crops=1", "--set", "feature_size=8"]


def _run_folder(tmp_path, cohort):
    plain = {**SMALL, "name": "run", "cohorts": [cohort], "output": str(tmp_path / "runs")}
    return initialise(parse_config(plain))[0]


def _split(tmp_path, *sites):
    """A split of phantoms: the last patient of every site is held out."""
    root = tmp_path / "phantoms"
    rows = phantom_rows(root, sites, seed=0).rows
    last = {f"{site.name}-{site.patients - 1:04d}" for site in sites}
    placed = [
        Placed(row, row.site, "test" if row.patient in last else "train") for row in rows
    ]  # fmt: skip
    folder = tmp_path / "split"
    folder.mkdir()
    write_sites(folder / "sites.csv", placed)
    write_about(Division("phantoms", root, by="site"), folder)
    return folder


def _sites(cohort):
    if cohort == "us":
        return [
            PhantomSiteConfig(name="a", modalities=("US",), format="png", patients=3, clips=1),
            PhantomSiteConfig(
                name="b", modalities=("US",), format="dicom", patients=2, anatomy="breast", clips=2
            ),
        ]
    size = {"size": (40, 36, 32), "spacing_mm": (7.0, 7.0, 7.0)}
    return [
        PhantomSiteConfig(name="a", patients=2, **size),
        PhantomSiteConfig(name="b", modalities=("CT", "MR"), format="dicom", patients=2, **size),
    ]


def _finetune(*arguments):
    app = typer.Typer(cls=CommandGroup, pretty_exceptions_enable=False)
    app.command()(finetune)
    app.command("other")(lambda: None)
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])


@pytest.mark.parametrize("cohort", ["ct-mr", "us"])
@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_the_command_writes_a_bundle_and_prints_what_it_reaches(
    tmp_path, monkeypatch, cohort, kind
):
    monkeypatch.chdir(tmp_path)
    run, split = _run_folder(tmp_path, cohort), _split(tmp_path, *_sites(cohort))
    asked = ["--task-kind", kind]
    if kind == "segmentation":
        # Of ultrasound: the heart's chambers at one site, skin and fat of the breast at the other.
        asked += ["--structures", "1,2,5,6" if cohort == "us" else "1,2"]
    else:
        label = "anatomy" if cohort == "us" else _label_with_two_classes(tmp_path)
        asked += ["--label", label]

    found = _finetune(run, split, "--out", "out", *asked, *QUICK)  # as people name folders

    assert found.exit_code == 0, found.output
    metrics = json.loads((tmp_path / "out" / "bundle" / "eval" / "metrics.json").read_text())
    main = "mean_dice" if kind == "segmentation" else "accuracy"
    assert f"{main} {metrics[main]:.4f}" in found.output
    assert metrics["failed"] == {}
    assert {row["site"] for row in metrics["scans"]} == {"a", "b"}
    report = json.loads((tmp_path / "out" / "report" / "metrics.json").read_text())
    assert report["bundle"][main] == metrics[main]
    assert (tmp_path / "out" / "report" / "predictions.png").stat().st_size > 1000
    metadata = json.loads((tmp_path / "out" / "bundle" / "configs" / "metadata.json").read_text())
    assert metadata["eval_metrics"][main] == metrics[main]


def test_label_maps_lie_over_the_images_that_they_are_of(tmp_path):
    """Bones are the brightest: they would not be under a label map of another order."""
    run, split = _run_folder(tmp_path, "ct-mr"), _split(tmp_path, *_sites("ct-mr"))
    given = ["--structures", "8", *QUICK, "--out", tmp_path / "out"]
    assert _finetune(run, split, *given).exit_code == 0
    data = tmp_path / "out" / "data"
    seen = 0
    for file in sorted((data / "labels").iterdir()):
        image = np.asarray(nib.load(data / "images" / file.name).dataobj).astype(float)
        bone = np.asarray(nib.load(file).dataobj) > 0
        np.testing.assert_allclose(
            nib.load(file).affine, nib.load(data / "images" / file.name).affine
        )
        if file.name.endswith("CT.nii.gz"):
            assert image[bone].mean() > image[~bone].max() * 0.4
            seen += 1
    assert seen == 2


def test_frames_of_clips_become_whole_screens_with_their_outlines(tmp_path):
    run, split = _run_folder(tmp_path, "us"), _split(tmp_path, *_sites("us"))
    given = ["--structures", "1,2", *QUICK, "--out", tmp_path / "out"]
    assert _finetune(run, split, *given).exit_code == 0
    items = json.loads((tmp_path / "out" / "bundle" / "configs" / "datalist.json").read_text())
    for item in items["test"]:
        data = tmp_path / "out" / "data"
        with Image.open(data / item["image"]) as image, Image.open(data / item["label"]) as truth:
            assert image.size == truth.size
            assert image.mode == "RGB"
            assert truth.getextrema() == (0, 2 if item["site"] == "a" else 0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--structures", "liver"], "no whole numbers"),
        (["--set", "rate=1"], "KEY=VALUE with one of"),
        (["--steps", "0"], "finetune.steps"),
        (["--cohort", "us"], "no cohort us"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(tmp_path, more, said):
    run, split = _run_folder(tmp_path, "ct-mr"), _split(tmp_path, *_sites("ct-mr"))
    found = _finetune(run, split, "--out", tmp_path / "out", *more)
    assert found.exit_code == 2
    assert said in found.output
    assert "Traceback" not in found.output


def test_a_split_of_other_modalities_or_none_is_refused(tmp_path):
    run, split = _run_folder(tmp_path, "us"), _split(tmp_path, *_sites("ct-mr"))
    found = _finetune(run, split, "--out", tmp_path / "out")
    assert (found.exit_code, "no scan of US" in found.output) == (2, True)
    found = _finetune(run, tmp_path, "--out", tmp_path / "out")
    assert (found.exit_code, "agssd-sim split" in found.output) == (2, True)


def _label_with_two_classes(tmp_path):
    """A phantom label that differs between held-out and training scans alike."""
    sites = _sites("ct-mr")
    rows = phantom_rows(tmp_path / "phantoms", sites, seed=0).rows
    for label in ("liver", "kidney", "lung", "heart", "brain"):
        if len({row.labels[label] for row in rows}) == 2:
            return label
    pytest.fail("no phantom organ is in some scans and not in others")
