"""A hospital's own table of labels, and what `agssd-site finetune` makes of it."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from agssd_core.config import PhantomSiteConfig, config_from_json, parse_config
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.index import index_folders
from agssd_core.errors import DataError
from agssd_core.signing import SigningKey
from client.cli import app
from client.delivered import Signed, write_checkpoint
from client.label_table import read_table
from server.delivery import Certified
from server.store import RunStore
from simulation.phantom_rows import phantom_rows
from simulation.run import initialise

QUICK = ["--steps", "2", "--set", "batch=1", "--set", "crops=1", "--set", "feature_size=8"]
SIZE = {"size": (40, 36, 32), "spacing_mm": (7.0, 7.0, 7.0)}
VOLUMES = PhantomSiteConfig(name="a", modalities=("CT", "MR"), format="dicom", patients=3, **SIZE)
NIFTI = PhantomSiteConfig(name="a", modalities=("CT",), patients=3, **SIZE)
FRAMES = PhantomSiteConfig(name="a", modalities=("US",), format="png", patients=3, clips=1)


def hospital(folder, phantoms):
    """An indexed site, and its labelled rows."""
    rows = phantom_rows(folder / "raw", [phantoms], seed=0).rows
    index_folders(folder / "site", [folder / "raw" / "a"])
    return folder / "site", rows


def table(folder, rows, **extra):
    """A CSV beside the raw scans, with relative paths and label maps."""
    file = folder / "raw" / "labels.csv"
    lines = [
        {
            "path": row.source.path,
            "mask": row.masks[0].source.path if row.masks else "",
            "diagnosis": "benign" if number % 2 else "malignant",
            **{name: value(row) for name, value in extra.items()},
        }
        for number, row in enumerate(rows)
    ]
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    return file


def encoder(folder, cohort):
    """A delivered checkpoint of an untrained run."""
    content = {"preset": "tiny", "data": {"spacing_mm": [6.0] * 3}, "cohorts": [cohort]}
    config = parse_config({**content, "name": "run", "output": str(folder / "runs")})
    checkpoint = RunStore(initialise(config)[0]).latest()
    own = config_from_json(checkpoint.manifest.config)
    certified = Certified.of(checkpoint, own, SigningKey.create())
    signed = Signed(certified.certificate, certified.signature)
    write_checkpoint(folder / "encoder", signed, checkpoint.weights)
    return folder / "encoder"


def last_patient(rows):
    last = max(row.patient for row in rows)
    return lambda row: "test" if row.patient == last else "train"


@pytest.mark.parametrize(
    ("phantoms", "cohort", "kind"),
    [
        (VOLUMES, "ct-mr", ["--structures", "1,2"]),
        (NIFTI, "ct-mr", ["--task-kind", "classification", "--label", "grade"]),
        (FRAMES, "us", ["--structures", "1,2"]),
    ],
    ids=["dicom", "nifti", "frames"],
)
def test_a_site_fine_tunes_on_its_own_scans_and_gets_a_bundle(tmp_path, phantoms, cohort, kind):
    site, rows = hospital(tmp_path, phantoms)
    first = {row.patient: number % 2 for number, row in enumerate(rows)}
    labels = table(
        tmp_path, rows, split=last_patient(rows), grade=lambda row: f"g{first[row.patient]}"
    )
    out = tmp_path / "out"
    arguments = [encoder(tmp_path, cohort), site, labels, "--out", out, *kind, *QUICK]
    answer = CliRunner().invoke(app, ["finetune", *map(str, arguments)])
    assert answer.exit_code == 0, answer.output
    metrics = json.loads((out / "bundle" / "eval" / "metrics.json").read_text())
    main = "accuracy" if "--label" in kind else "mean_dice"
    assert f"{main} {metrics[main]:.4f}" in answer.output
    names = {record.name for record in open_catalogue(site).scans}
    assert {Path(row["name"]).name.split(".f")[0] for row in metrics["scans"]} <= names
    assert out.stat().st_mode & 0o077 == 0
    # Nothing that the bundle hands on names the source or the patient.
    for file in (out / "bundle").rglob("*"):
        if file.is_file() and file.suffix != ".pyc":
            content = file.read_bytes()
            assert not [row for row in rows if row.patient.encode() in content], file.name
            assert str(tmp_path).encode() not in content, file.name


def test_label_maps_lie_over_a_dicom_series_that_they_were_drawn_on(tmp_path):
    site, rows = hospital(tmp_path, VOLUMES)
    found = read_table(table(tmp_path, rows), site)
    assert (len(found.scans), found.left_out) == (6, {})
    for scan in found.scans:
        if scan.modality == "CT":
            volume = scan.volume()
            bone = scan.volume_mask(volume) == 8
            assert volume.array[bone].mean() > volume.array[~bone].mean() + 300


def test_whole_patients_are_held_out_and_every_class_on_both_sides(tmp_path):
    site, rows = hospital(tmp_path, PhantomSiteConfig(name="a", patients=6, **SIZE))
    labels = table(tmp_path, rows)
    found = read_table(labels, site, label="diagnosis")
    sides = {(scan.split, scan.labels["diagnosis"]) for scan in found.scans}
    assert sides == {(s, d) for s in ("train", "test") for d in ("benign", "malignant")}
    assert found == read_table(labels, site, label="diagnosis")
    others = [read_table(labels, site, label="diagnosis", seed=seed) for seed in range(1, 5)]
    assert any(other.scans != found.scans for other in others)
    both, rows = hospital(tmp_path / "both", VOLUMES)
    split = {}
    for scan in read_table(table(tmp_path / "both", rows), both).scans:
        split.setdefault(scan.patient, set()).add(scan.split)
    assert sorted(map(len, split.values())) == [1, 1, 1]


def test_lines_that_cannot_be_used_are_named_by_number_alone(tmp_path):
    site, rows = hospital(tmp_path, NIFTI)
    labels = table(tmp_path, rows)
    with labels.open("a") as stream:
        stream.write("elsewhere/Mustermann.nii.gz,,benign\n")
        stream.write(f"{rows[0].source.path},,benign\n")
        stream.write("a,,benign\n,,benign\n")
    found = read_table(labels, site)
    assert len(found.scans) == 3
    assert list(found.left_out) == ["line 5", "line 6", "line 7", "line 8"]
    said = list(found.left_out.values())
    for text, words in zip(said, ["no scan", "twice", "3 scans lie there", "no path"], strict=True):
        assert words in text
    assert "Mustermann" not in " ".join(said)


def test_scans_may_be_named_as_show_names_them(tmp_path):
    site, _ = hospital(tmp_path, NIFTI)
    names = [record.name for record in open_catalogue(site).scans]
    file = tmp_path / "labels.csv"
    file.write_text("scan;grade;split\n" + "".join(f"{n};g1;train\n" for n in names[:-1]))
    with file.open("a") as stream:
        stream.write(f"{names[-1]};g2;test\nunknown;g2;\n")
    found = read_table(file, site, label="grade")
    assert [scan.split for scan in found.scans].count("test") == 1
    assert "agssd-site show" in found.left_out["line 5"]


BAD = {
    "no column": ("file,grade\nx,1\n", "a column path or a column scan"),
    "two columns": ("path,scan\nx,y\n", "and not both"),
    "no row": ("path,grade\n", "and a row"),
    "twice": ("path,grade,grade\nx,1,1\n", "a name of its own"),
    "nothing usable": ("path,grade\nx.nii,1\n", "none of the table's 1 row"),
    "no label": ("path,other\nx.nii,1\n", "no column for the label grade"),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD)
def test_tables_that_cannot_be_used_are_refused(tmp_path, text, said):
    site, _ = hospital(tmp_path, NIFTI)
    file = tmp_path / "labels.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=said):
        read_table(file, site, label="grade")


def test_a_patient_on_both_sides_is_refused(tmp_path):
    site, rows = hospital(tmp_path, VOLUMES)
    labels = table(tmp_path, rows, split=lambda row: "test" if row.modality == "CT" else "train")
    with pytest.raises(DataError, match="both sides"):
        read_table(labels, site)


@pytest.mark.parametrize("fault", ["shape", "place", "fraction", "unplaced", "text", "missing"])
def test_a_label_map_that_does_not_fit_its_scan_is_refused(tmp_path, fault):
    site, rows = hospital(tmp_path, NIFTI)
    labels = table(tmp_path, rows)
    file = tmp_path / "raw" / rows[0].masks[0].source.path
    held = nib.load(file)
    values, affine = np.asarray(held.dataobj).astype(np.float32), held.affine.copy()
    if fault == "shape":
        values = values[:-1]
    if fault == "place":
        affine[0, 3] += 30
    if fault == "fraction":
        values = values + 0.5
    image = nib.Nifti1Image(values, affine)
    if fault == "unplaced":
        image.set_sform(None, 0)
        image.set_qform(None, 0)
    nib.save(image, file)
    if fault == "text":
        file.write_bytes(b"no label map")
    if fault == "missing":
        file.unlink()
    scan = next(s for s in read_table(labels, site).scans if s.mask == file)
    said = {
        "shape": "must be equal",
        "place": "beside its scan",
        "fraction": "no structures",
        "unplaced": "places it nowhere",
        "text": "no readable NIfTI",
        "missing": "is missing",
    }
    with pytest.raises(DataError, match=said[fault]) as refused:
        scan.volume_mask(scan.volume())
    assert str(tmp_path) not in str(refused.value)
