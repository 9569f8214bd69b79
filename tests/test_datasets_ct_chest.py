"""LIDC-IDRI, LUNA16, CC-CCII and STOIC: rows of miniatures in the official layouts."""

import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - the library's own custom

from agssd_core.errors import DataError
from simulation.datasets import cc_ccii, lidc_idri, luna16, stoic
from simulation.datasets.reading import read_volume, read_volume_mask
from tests.support.ct_sets import (
    ct_array,
    nodule,
    roi,
    save_lidc_series,
    save_reading,
    save_slices,
    square,
)


def by_scan(found):
    return {row.scan: row for row in found.rows}


def make_lidc(root):
    """Four patients; returns the numbers of their CT series."""
    top = root / "LIDC-IDRI"
    numbers = {}
    for place, maker in enumerate(("GE MEDICAL SYSTEMS", "TOSHIBA", "Philips"), start=1):
        patient = f"LIDC-IDRI-{place:04d}"
        folder = top / patient / "study" / "series"
        files = save_lidc_series(folder, patient, maker=maker, seed=str(place))
        first = pydicom.dcmread(files[5])
        numbers[place] = str(first.SeriesInstanceUID)
        outline = roi(str(first.SOPInstanceUID), square(4, 12))
        bad, good = nodule(outline, malignancy=5), nodule(outline, malignancy=1)
        if place == 1:
            save_reading(folder / "158.xml", [[bad, good], [bad], [good], []])
        if place == 2:
            xml = root / "LIDC-XML-only" / "tcia-lidc-xml" / "157" / "1.xml"
            save_reading(xml, [[good], [], [], []], series=numbers[2])
            save_reading(folder / "0.xml", [[bad]], tag="IdriReadMessage")
            (folder / "9.xml").write_text("<!DOCTYPE x><LidcReadMessage/>")
    save_lidc_series(
        top / "LIDC-IDRI-0001" / "study2" / "xray", "LIDC-IDRI-0001", seed="9", modality="DX"
    )
    second = top / "LIDC-IDRI-0003" / "study2" / "series"
    save_lidc_series(second, "LIDC-IDRI-0003", maker="Acme", seed="10")
    (second / "._0001.dcm").write_bytes(b"x")
    return numbers


def test_lidc_takes_makers_from_headers_and_nodules_from_readings(tmp_path):
    make_lidc(tmp_path)
    found = lidc_idri.ADAPTER.read(tmp_path)
    told = [(row.scan, row.site, row.vendor, dict(row.labels)) for row in found.rows]
    assert told == [
        ("LIDC-IDRI-0001-1", "GE", "GE", {"nodule": "present", "malignancy": "high"}),
        ("LIDC-IDRI-0002-1", "Canon", "Canon", {"nodule": "absent", "malignancy": "low"}),
        ("LIDC-IDRI-0003-1", "Philips", "Philips", {}),
        ("LIDC-IDRI-0003-2", "", "other", {}),
    ]
    assert sorted(found.notes) == [
        "1 patient(s) with several series",
        "1 reading(s) left out: no plain, whole XML",
        "1 series left out: no CT (radiographs)",
        "2 series without readings: no outlines and classes",
    ]
    first = found.rows[0]
    assert first.patient == "LIDC-IDRI-0001"
    mask = read_volume_mask(tmp_path, first, read_volume(tmp_path, first))
    assert mask.sum() == 7 * 7
    assert found.rows[1].masks[0].source.path == "LIDC-XML-only/tcia-lidc-xml/157/1.xml"
    # The folder of the patients is a root as well.
    assert len(lidc_idri.ADAPTER.read(tmp_path / "LIDC-IDRI").rows) == 4


def save_itk(file, array=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    array = ct_array() if array is None else array
    sitk.WriteImage(sitk.GetImageFromArray(array.transpose(2, 1, 0)), str(file))


def make_luna(root, names):
    for place, name in enumerate(names):
        save_itk(root / f"subset{place}" / f"{name}.mhd")
    lungs = (ct_array() > 0).astype("uint8") * 3
    save_itk(root / "seg-lungs-LUNA16" / f"{names[0]}.mhd", lungs)
    (root / "annotations.csv").write_text(
        f"seriesuid,coordX,coordY,coordZ,diameter_mm\n{names[0]},1,2,3,5.6\n{names[0]},4,5,6,7.8\n"
    )
    return lungs


def test_luna_tells_who_has_a_nodule_and_knows_no_maker_alone(tmp_path):
    lungs = make_luna(tmp_path, ["1.3.6.1", "1.3.6.2"])
    (tmp_path / "subset1" / "1.3.6.3.mhd").write_text("ElementDataFile = 1.3.6.3.raw\n")
    found = luna16.ADAPTER.read(tmp_path)
    told = [(row.scan, row.patient, row.vendor, dict(row.labels)) for row in found.rows]
    assert told == [
        ("1.3.6.1", "1.3.6.1", "", {"nodule": "present"}),
        ("1.3.6.2", "1.3.6.2", "", {"nodule": "absent"}),
    ]
    assert [row.facts["subset"] for row in found.rows] == ["0", "1"]
    assert found.notes == (
        "1 scan(s) left out: the .raw file is missing",
        "2 scan(s) of unknown maker: not in a folder LIDC-IDRI below the root",
        "1 scan(s) without a mask of the lungs",
    )
    mask = read_volume_mask(tmp_path, found.rows[0], read_volume(tmp_path, found.rows[0]))
    assert (mask == 3).sum() == (lungs == 3).sum()


def test_luna_joins_makers_and_patients_of_a_lidc_folder(tmp_path):
    numbers = make_lidc(tmp_path)
    make_luna(tmp_path, [numbers[2], "1.3.6.2"])
    (tmp_path / "annotations.csv").unlink()
    rows = by_scan(luna16.ADAPTER.read(tmp_path))
    joined = rows[numbers[2]]
    assert (joined.patient, joined.vendor, joined.site) == ("LIDC-IDRI-0002", "Canon", "Canon")
    assert not joined.labels
    assert rows["1.3.6.2"].vendor == ""


def test_cc_ccii_orders_slices_and_counts_gaps(tmp_path):
    save_slices(tmp_path / "NCP" / "12" / "1201", range(1, 11), ending="jpg")
    save_slices(tmp_path / "Normal" / "700" / "3001", [*range(8), 12])
    save_slices(tmp_path / "CP-1" / "CP" / "1070" / "3137", range(9))
    save_slices(tmp_path / "CP-2" / "1071" / "3140", range(3))
    save_slices(tmp_path / "CP-2" / "1071" / "3141", range(9))
    (tmp_path / "CP-2" / "1071" / "3141" / "8.jpg").write_bytes(b"x")
    (tmp_path / "NCP" / ".DS_Store").write_bytes(b"x")
    found = cc_ccii.ADAPTER.read(tmp_path)
    told = [(row.scan, row.patient, row.labels["class"]) for row in found.rows]
    assert told == [
        ("CP-1070-3137", "1070", "CP"),
        ("NCP-12-1201", "12", "NCP"),
        ("Normal-700-3001", "700", "Normal"),
    ]
    assert by_scan(found)["Normal-700-3001"].facts["missing_slices"] == "4"
    assert "missing_slices" not in by_scan(found)["NCP-12-1201"].facts
    assert set(found.notes) == {
        "1 scan(s) with gaps in the numbers of their slices",
        "1 scan(s) left out: fewer than 8 slices",
        "1 scan(s) left out: a slice number stands twice",
    }
    volume = read_volume(tmp_path, by_scan(found)["NCP-12-1201"])
    assert volume.array.shape == (12, 10, 10)
    assert volume.spacing_mm == pytest.approx((0.7, 0.7, 3))
    assert volume.array[0, 0, 0] < volume.array[0, 0, 9] < 0


def test_parts_of_cc_ccii_named_alike_are_found(tmp_path):
    save_slices(tmp_path / "CP-1" / "1070" / "3137", range(9))
    rows = cc_ccii.ADAPTER.read(tmp_path).rows
    assert [(row.scan, row.labels["class"]) for row in rows] == [("CP-1070-3137", "CP")]


def save_mha(file, extra=""):
    save_itk(file)
    head, mark, rest = file.read_bytes().partition(b"ElementDataFile")
    file.write_bytes(head + extra.encode() + mark + rest)


def test_stoic_takes_classes_from_the_reference_and_notes_what_is_missing(tmp_path):
    save_mha(tmp_path / "data" / "mha" / "10.mha", "PatientAge = 065Y\nPatientSex = F\n")
    for name in ("2", "30"):
        save_mha(tmp_path / "data" / "mha" / f"{name}.mha")
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "reference.csv").write_text(
        "PatientID,probCOVID,probSevere\n10,1,0\n2.0,0.0,0.0\n99,1,1\n"
    )
    found = stoic.ADAPTER.read(tmp_path)
    told = {row.scan: dict(row.labels) for row in found.rows}
    assert told == {
        "10": {"covid": "positive", "severe": "no"},
        "2": {"covid": "negative", "severe": "no"},
        "30": {},
    }
    assert by_scan(found)["10"].facts == {"age": "65", "sex": "F"}
    assert found.notes == (
        "1 scan(s) without a row in reference.csv: no classes",
        "1 row(s) of reference.csv without a scan",
    )
    assert read_volume(tmp_path, by_scan(found)["10"]).array.shape == (10, 9, 8)


@pytest.mark.parametrize(
    ("adapter", "fact"),
    [
        (lidc_idri.ADAPTER, "no CT series below a folder such as LIDC-IDRI/LIDC-IDRI-0001"),
        (luna16.ADAPTER, "no folder subset0"),
        (cc_ccii.ADAPTER, "no folder CP, NCP or Normal"),
        (stoic.ADAPTER, "no file such as data/mha/1234.mha"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.info.name,
)
def test_another_layout_is_refused_with_what_was_expected_where(tmp_path, adapter, fact):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=fact) as caught:
        adapter.read(tmp_path)
    assert adapter.info.title in str(caught.value)
    assert all(line in str(caught.value) for line in adapter.info.layout)
    assert str(tmp_path) not in str(caught.value)
