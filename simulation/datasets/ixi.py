"""IXI: healthy brains from three hospitals in London.

File names, hospitals and their scanners are verified, and that ``IXI.xls`` has people twice and
others not at all. Names of its columns other than IXI_ID are read by their beginning.
"""

import io
import re
from pathlib import Path

import xlrd

from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    Row,
    Source,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import Tally, below, number_text, said, visible

TABLE = "IXI.xls"
# Hospital -> maker of its scanner and field strength in tesla.
SCANNERS = {"Guys": ("Philips", "1.5"), "HH": ("Philips", "3"), "IOP": ("GE", "1.5")}
INFO = DatasetInfo(
    name="ixi",
    title="IXI",
    modalities=("MR",),
    size="about 600 people with up to 5 sequences, about 25 GB with diffusion",
    licence="CC BY-SA 3.0",
    url="https://brain-development.org/ixi-dataset/",
    site="hospital in the file name: Guys, HH, IOP; each has one scanner",
    site_verified=True,
    layout=(
        "IXI002-Guys-0828-T1.nii.gz (T1, T2, PD, MRA; DTI with -00 to -15), here or one folder "
        "down, such as IXI-T1",
        f"{TABLE}, optional",
    ),
    citation="brain-development.org, IXI data set",
    labels={"sex": ("male", "female")},
)
_NAME = re.compile(
    r"(IXI\d+)-(Guys|HH|IOP)-(\d+)-(T1|T2|PD|MRA|DTI)(?:-(\d+))?\.nii(?:\.gz)?", re.IGNORECASE
)
_SITES = {name.casefold(): name for name in SCANNERS}
_SEXES = {"1": "male", "2": "female"}


def read(root: Path) -> DatasetRows:
    """Every scan, with sex and age where the table is sure of them.

    Raises:
        DataError: no file with the name of an IXI scan.
    """
    tally = Tally()
    people, problem = _people(root, tally)
    rows: dict[str, Row] = {}
    files = [*visible(root), *(file for folder in visible(root) for file in visible(folder))]
    for file in files:
        named = _NAME.fullmatch(file.name)
        if named is None or not file.is_file():
            if file.name.endswith((".nii", ".nii.gz")):
                tally.add("file(s) left out: not named as an IXI scan")
            continue
        row = _row(root, file, named, people)
        if row.scan in rows:
            tally.add("file(s) left out: a copy lies in another folder or with another ending")
        rows.setdefault(row.scan, row)
    if not rows:
        raise wrong_layout(INFO, "no file such as IXI002-Guys-0828-T1.nii.gz")
    seen = {row.patient for row in rows.values()}
    if people:
        tally.add(f"person(s) with scans stand not in {TABLE}", len(seen - people.keys()))
    return sorted_rows(list(rows.values()), (*([problem] if problem else []), *tally.lines))


def _row(root: Path, file: Path, named: re.Match[str], people: dict[str, dict[str, str]]) -> Row:
    patient, hospital, number, sequence, direction = named.groups()
    patient, sequence, site = patient.upper(), sequence.upper(), _SITES[hospital.casefold()]
    vendor, tesla = SCANNERS[site]
    person = people.get(patient, {})
    return Row(
        scan="-".join(filter(None, (patient, site, number, sequence, direction))),
        patient=patient,
        modality="MR",
        source=Source(below(root, file), "nifti"),
        site=site,
        vendor=vendor,
        sequence=sequence,
        labels={"sex": person["sex"]} if "sex" in person else {},
        facts={"field_tesla": tesla, **({"age": person["age"]} if "age" in person else {})},
    )


def _people(root: Path, tally: Tally) -> tuple[dict[str, dict[str, str]], str]:
    """Sex and age by patient, and why there are none.

    What two lines of one person say differently is left out.
    """
    file = root / TABLE
    if not file.is_file():
        return {}, f"no {TABLE}: sex and age are unknown"
    try:
        # Its remarks about odd files would go to standard output.
        sheet = xlrd.open_workbook(str(file), logfile=io.StringIO()).sheet_by_index(0)
        lines = [[str(cell) for cell in sheet.row_values(at)] for at in range(sheet.nrows)]
    except (OSError, xlrd.XLRDError, xlrd.compdoc.CompDocError, AssertionError, ValueError):
        return {}, f"{TABLE} is damaged: sex and age are unknown"
    names = [name.strip().upper() for name in lines[0]] if lines else []
    people: dict[str, dict[str, str]] = {}
    twice = set()
    for line in lines[1:]:
        cells = dict(zip(names, line, strict=True))
        number = number_text(cells.get("IXI_ID", ""))
        if not number.isdigit():
            continue
        patient = f"IXI{int(number):03d}"
        person = _person(cells)
        if patient in people:
            twice.add(patient)
            person = {
                name: value for name, value in person.items() if people[patient].get(name) == value
            }
        people[patient] = person
    tally.add(f"person(s) stand twice in {TABLE}; what differs is left out", len(twice))
    return people, ""


def _person(cells: dict[str, str]) -> dict[str, str]:
    sex = next((number_text(cell) for name, cell in cells.items() if name.startswith("SEX")), "")
    age = said(cells.get("AGE", ""))
    found = {"sex": _SEXES[sex]} if sex in _SEXES else {}
    with_age = re.fullmatch(r"\d+(\.\d+)?", age) and float(age) > 0
    return {**found, "age": f"{float(age):.1f}"} if with_age else found


ADAPTER = Adapter(INFO, read)
