"""A folder with a table of its scans."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from agssd_core.errors import DataError
from simulation.datasets.manifest import ADAPTER, read_manifest
from simulation.datasets.rows import DatasetRows, Mask, Row, Source

COLUMNS = ("path", "modality", "site", "patient", "label", "mask")


def lay_out(root: Path, lines: list[dict[str, str]], *, missing: tuple[str, ...] = ()) -> None:
    """Write a table and an empty file for every path that it names."""
    names = list(dict.fromkeys([*COLUMNS, *(name for line in lines for name in line)]))
    with (root / "MANIFEST.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names, restval="")
        writer.writeheader()
        writer.writerows(lines)
    for line in lines:
        for path in (line["path"], *line.get("mask", "").split(";")):
            file = root / path.strip()
            if not path or path in missing or ".." in path or path.startswith("/"):
                continue
            if path.endswith("/"):
                file.mkdir(parents=True, exist_ok=True)
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()


def by_path(found: DatasetRows) -> dict[str, Row]:
    return {row.source.path: row for row in found.rows}


def line(path: str, modality: str = "MR", **more: str) -> dict[str, str]:
    return {"path": path, "modality": modality, **more}


def test_every_column_reaches_its_row(tmp_path):
    lay_out(
        tmp_path,
        [
            {
                **line("3d/a/p1.nii.gz", "CT", site="Hall A", vendor="SIEMENS", patient="p1"),
                **{"label": "sick", "label:sex": "m", "fact:age": "70", "split": "val"},
                **{"mask": "3d/a/m1.nii.gz; 3d/a/m2.nii.gz", "sequence": "late"},
            }
        ],
    )
    (row,) = read_manifest(tmp_path).rows
    assert row == Row(
        scan="3d_a_p1",
        patient="p1",
        modality="CT",
        source=Source("3d/a/p1.nii.gz", "nifti"),
        site="Hall A",
        vendor="Siemens",
        sequence="late",
        labels={"class": "sick", "sex": "m"},
        masks=tuple(Mask(Source(f"3d/a/m{n}.nii.gz", "nifti"), value=1) for n in (1, 2)),
        split="validation",
        facts={"folder": "3d/a", "site_text": "Hall A", "age": "70"},
    )


def test_the_label_cell_may_say_something_other_than_a_class(tmp_path):
    lay_out(
        tmp_path,
        [
            line("a.nii.gz", label="mask:GTV"),
            line("b.nii.gz", label="sequence:T1W"),
            line("c.nii.gz", label="(same case as a)"),
            line("d.nii.gz", label="benign"),
        ],
    )
    rows = by_path(read_manifest(tmp_path))
    assert [dict(rows[f"{name}.nii.gz"].labels) for name in "abcd"] == [
        *({}, {}, {}),
        {"class": "benign"},
    ]
    assert rows["a.nii.gz"].facts["mask"] == "GTV"
    assert rows["b.nii.gz"].sequence == "T1W"


def test_patients_are_derived_as_the_index_of_a_site_does(tmp_path):
    lay_out(
        tmp_path,
        [
            line("us/set/S1_L20_step_1.png", "US"),
            line("us/set/S1_L20_step_2.png", "US"),
            line("3d/STS_002/CT_image.nii.gz", "CT"),
            line("dicom/one/"),
            line("us/probe/a.dcm", "US"),
        ],
    )
    patients = {path: row.patient for path, row in by_path(read_manifest(tmp_path)).items()}
    assert patients == {
        "us/set/S1_L20_step_1.png": "S1",
        "us/set/S1_L20_step_2.png": "S1",
        "3d/STS_002/CT_image.nii.gz": "STS_002",
        "dicom/one": "dicom_one",
        "us/probe/a.dcm": "us_probe_a",
    }


@pytest.mark.parametrize(
    ("site", "vendor"),
    [
        ("GE MEDICAL SYSTEMS Discovery ST", "GE"),
        ("Philips HD11XE (Seynnes & Cronin)", "Philips"),
        ("SIEMENS Avanto", "Siemens"),
        ("Telemed SmartUs", "Telemed"),
        ("Neuruppin (DE)", ""),
        ("", ""),
    ],
)
def test_the_site_names_the_vendor_where_it_is_one(tmp_path, site, vendor):
    lay_out(tmp_path, [line("a.nii.gz", site=site)])
    assert read_manifest(tmp_path).rows[0].vendor == vendor


def test_what_cannot_be_used_is_counted_and_the_rest_goes_on(tmp_path):
    lay_out(
        tmp_path,
        [
            line("good.nii.gz", mask="gone.nii.gz"),
            line("good.nii.gz"),
            line("missing.nii.gz"),
            line("missing/"),
            line("pet.nii.gz", "PT"),
            line("../outside.nii.gz"),
            line("/etc/outside.nii.gz"),
            line("slice.png", "CT"),
            line("notes.docx"),
            line("odd.nii.gz", split="holdout"),
        ],
        missing=("missing.nii.gz", "missing/", "gone.nii.gz"),
    )
    found = read_manifest(tmp_path)
    assert list(by_path(found)) == ["good.nii.gz", "odd.nii.gz"]
    assert by_path(found)["good.nii.gz"].masks == ()
    assert sorted(found.notes) == [
        "1 mask(s) left out: the file is missing",
        "1 row(s) of the table left out: the scan is listed twice",
        "1 scan(s) left out: an image or a video is no volume of CT or MR",
        "1 scan(s) left out: the format is not known",
        "1 scan(s) left out: their modality is not CT, MR or US",
        "1 split(s) not understood; train, validation and test are",
        "2 scan(s) left out: the file is missing",
        "2 scan(s) left out: the path leads out of the folder",
    ]


def test_paths_that_only_differ_in_signs_are_different_scans_and_patients(tmp_path):
    lay_out(tmp_path, [line("a b.dcm", "US"), line("a_b.dcm", "US"), line("a-b.dcm", "US")])
    rows = read_manifest(tmp_path).rows
    assert len({row.scan for row in rows}) == 3
    assert len({row.patient for row in rows}) == 3


def test_only_takes_what_fits_a_pattern(tmp_path):
    lay_out(tmp_path, [line("3d/x/a.nii.gz"), line("us/y/b.png", "US"), line("us/z/c.png", "US")])
    assert list(by_path(read_manifest(tmp_path, only=("3d/*", "us/y/*")))) == [
        "3d/x/a.nii.gz",
        "us/y/b.png",
    ]
    assert read_manifest(tmp_path, only=("3d/*", "ct/*")).notes == (
        "no scan fits the pattern ct/*",
    )
    with pytest.raises(DataError, match="Patterns are paths below its folder"):
        read_manifest(tmp_path, only=("ct/*",))


def test_masks_in_jpeg_are_cut_at_half(tmp_path):
    lay_out(tmp_path, [line("a.jpg", "US", mask="m.jpg"), line("b.png", "US", mask="m.png")])
    rows = by_path(read_manifest(tmp_path))
    assert (rows["a.jpg"].masks[0].threshold, rows["b.png"].masks[0].threshold) == (127.0, 0.0)


def test_a_table_of_other_habits_is_read(tmp_path):
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "MANIFEST.csv").write_bytes("\ufeffpath; modality\na.nii.gz; mri\n\n".encode())
    (row,) = read_manifest(tmp_path).rows
    assert (row.source.path, row.modality) == ("a.nii.gz", "MR")


def test_another_folder_is_refused_with_what_was_expected(tmp_path):
    with pytest.raises(DataError, match=r"no file MANIFEST.csv. Expected below"):
        ADAPTER.read(tmp_path)
    (tmp_path / "MANIFEST.csv").write_text("path,kind\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="has no column modality"):
        ADAPTER.read(tmp_path)


@pytest.mark.realdata
def test_the_real_images_are_all_rows(real_data):
    found = read_manifest(real_data)
    assert found.notes == ()
    assert Counter(row.modality for row in found.rows) == {"US": 157, "MR": 23, "CT": 12}
    assert sum(len(row.masks) for row in found.rows) == 86
    assert all((real_data / mask.source.path).is_file() for r in found.rows for mask in r.masks)
    sts = read_manifest(real_data, only=("3d/sts/*",)).rows
    assert Counter((row.modality, row.vendor) for row in sts) == {
        ("CT", "GE"): 10,
        ("MR", "GE"): 4,
        ("MR", "Philips"): 3,
        ("MR", "Siemens"): 3,
    }
    assert len({row.patient for row in sts}) == 10
    busi = read_manifest(real_data, only=("us2d/busi/*",)).rows
    assert Counter(row.labels["class"] for row in busi) == {
        "benign": 22,
        "malignant": 22,
        "normal": 22,
    }
    assert len({row.patient for row in busi}) == 66
