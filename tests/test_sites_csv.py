"""The table of a division: read back as written, and refused where it would leak or escape."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.errors import DataError
from simulation.datasets.rows import Mask, Row, Source
from simulation.partition import Placed
from simulation.sites_csv import COLUMNS, read_sites, write_sites

text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1, max_size=12
)
plain = st.text("abcXYZ019 ._-é", min_size=1, max_size=12)
words = st.dictionaries(text, text, max_size=3)
sources = st.builds(
    Source,
    plain.map(lambda name: f"folder/{name}.nii.gz"),
    st.sampled_from(["nifti", "npz", "dicom", "image"]),
    st.none() | st.integers(0, 9),
    text | st.just(""),
)
masks = st.builds(Mask, sources, st.none() | st.integers(1, 9), st.sampled_from([0.0, 127.0]))


@st.composite
def divisions(draw):
    found = []
    for number in range(draw(st.integers(1, 5))):
        row = Row(
            f"{draw(text)}-{number}",
            f"{draw(text)}-{number}",
            draw(st.sampled_from(["CT", "MR", "US"])),
            draw(sources),
            site=draw(text),
            sequence=draw(text),
            labels=draw(words),
            masks=tuple(draw(st.lists(masks, max_size=2))),
            split=draw(st.sampled_from(["", "train", "test"])),
            facts=draw(words),
        )
        site = draw(st.sampled_from(["a", "b"]))
        found.append(Placed(row, site, draw(st.sampled_from(["train", "test"]))))
    return found


@settings(max_examples=150, deadline=None)
@given(placed=divisions(), random=st.randoms())
def test_what_is_written_is_read_back_in_any_order(tmp_path_factory, placed, random):
    folder = tmp_path_factory.mktemp("table")
    write_sites(folder / "one.csv", placed)
    write_sites(folder / "two.csv", random.sample(placed, len(placed)))
    assert (folder / "one.csv").read_bytes() == (folder / "two.csv").read_bytes()
    found = read_sites(folder / "one.csv")
    assert sorted(found, key=repr) == sorted(placed, key=repr)


def row(scan="s", patient="p", path="a.nii", **more):
    return Row(scan, patient, "CT", Source(path, "nifti"), **more)


@pytest.mark.parametrize(
    "placed",
    [
        [Placed(row("s"), "a", "train"), Placed(row("t"), "b", "train")],
        [Placed(row("s"), "a", "train"), Placed(row("t"), "a", "test")],
        [Placed(row("s", "p"), "a", "train"), Placed(row("s", "q"), "a", "train")],
    ],
    ids=["two sites", "two sides", "one scan twice"],
)
def test_a_division_that_leaks_is_not_written(tmp_path, placed):
    with pytest.raises(DataError, match="Give each patient one site and one side"):
        write_sites(tmp_path / "sites.csv", placed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["../x.nii", "/etc/x.nii", "a/../../x", "..\\x", "C:\\x", ""])
def test_paths_stay_below_the_data_set(tmp_path, path):
    with pytest.raises(DataError, match="Name files below it"):
        write_sites(tmp_path / "sites.csv", [Placed(row(path=path), "a", "train")])
    mask = Mask(Source(path, "nifti"))
    with pytest.raises(DataError, match="Name files below it"):
        write_sites(tmp_path / "sites.csv", [Placed(row(masks=(mask,)), "a", "train")])


@pytest.mark.parametrize("path", ["\udcff.nii", "a\r.nii"])
def test_a_name_that_is_no_text_is_counted_and_not_half_written(tmp_path, path):
    file = tmp_path / "sites.csv"
    write_sites(file, [Placed(row(), "a", "train")])
    before = file.read_bytes()
    with pytest.raises(DataError, match=r"1 scan\(s\) have names with signs"):
        write_sites(file, [Placed(row(path=path), "a", "train")])
    assert file.read_bytes() == before


def edited(**cells):
    """A table of one scan with some cells changed."""
    good = {
        **{"site": "a", "split": "train", "patient": "p", "scan": "s", "modality": "CT"},
        **{"vendor": "", "sequence": "", "labels": "{}", "path": "a.nii", "kind": "nifti"},
        **{"index": "", "key": "", "masks": "[]", "natural_site": "", "official_split": ""},
        "facts": "{}",
    }
    stream = io.StringIO()
    table = csv.DictWriter(stream, COLUMNS)
    table.writeheader()
    table.writerow({**good, **cells})
    return stream.getvalue()


@pytest.mark.parametrize(
    "cells",
    [
        *({"site": "../../x"}, {"site": ""}, {"split": "all"}, {"patient": ""}, {"scan": ""}),
        *({"modality": "PET"}, {"kind": "pickle"}, {"index": "1.5"}, {"official_split": "no"}),
        *({"labels": "[]"}, {"labels": '{"a": 1}'}, {"facts": "{"}, {"masks": '[{"value": 1}]'}),
        {"masks": '[{"source": {"path": 3, "kind": "nifti", "index": null, "key": ""}, "value": 1,'
         ' "threshold": 0}]'},
        *({"labels": "[" * 100_000}, {"facts": f'{{"a": "{"x" * 200_000}"}}'}),
    ],
    ids=lambda cells: f"{next(iter(cells.items()))}"[:30],
)  # fmt: skip
def test_a_damaged_line_is_refused_by_number(tmp_path, cells):
    file = tmp_path / "sites.csv"
    file.write_text(edited())
    assert len(read_sites(file)) == 1
    file.write_text(edited(**cells))
    with pytest.raises(DataError, match="damaged in its scan 1"):
        read_sites(file)


@pytest.mark.parametrize("content", [b"", b"site,split\n", b"\xff\xfe\0", "x" * 9000])
def test_a_table_of_something_else_is_refused(tmp_path, content):
    file = tmp_path / "sites.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match="ake it again"):
        read_sites(file)


def test_a_folder_or_nothing_in_place_of_the_table_is_refused(tmp_path):
    with pytest.raises(DataError, match="make it again"):
        read_sites(tmp_path)
    with pytest.raises(DataError, match="there is no"):
        read_sites(tmp_path / "none.csv")
