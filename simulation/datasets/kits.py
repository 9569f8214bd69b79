"""KiTS 2019, 2021 and 2023: kidneys with tumours on CT, from many hospitals.

Folders, file names and both tables of sites are verified. From memory: value 3 (cyst, since 2021)
and the columns of ``kits.json``. Arrays of these files are stored slices first; the header's affine
says so, and every reader here goes by the affine.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulation.datasets.ct_files import outlines
from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    Row,
    Source,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import (
    Tally,
    below,
    folders_named,
    nifti_file,
    number_text,
    read_table,
)

ALL_SITES, SILOS = "anony_sites.csv", "thresholded_sites.csv"
INFO = DatasetInfo(
    name="kits",
    title="KiTS 2019, 2021 or 2023",
    modalities=("CT",),
    size="300 (2019, 2021) or 599 (2023) patients, 210 to 489 with outlines, about 30 to 80 GB",
    licence="CC BY-NC-SA 4.0",
    url="https://kits-challenge.org",
    site=f"hospital in {ALL_SITES} (87), else silo in {SILOS} (6), both of FLamby; unknown without",
    site_verified=True,
    layout=(
        "data/case_00000/{imaging.nii.gz,segmentation.nii.gz} (2019), or the same in dataset/ "
        "(2021, 2023); the root may also hold the cases",
        f"{ALL_SITES} or {SILOS} (case, site_id), here or in metadata/ or fed_kits19/metadata/, "
        "optional",
        "kits.json, here or beside the cases, optional",
    ),
    citation="Heller et al. 2021, doi:10.1016/j.media.2020.101821",
    structures={1: "kidney", 2: "tumour", 3: "cyst"},
    labels={"malignant": ("no", "yes")},
    shares_patients_with=("flare22", "flare23"),
)
_CASE = r"case_(\d{5})"


def read(root: Path) -> DatasetRows:
    """Every case with a scan, with its hospital where a table names it.

    Raises:
        DataError: no case, no scan in any, or a table that cannot be read.
    """
    cases = folders_named(root, _CASE, depth=2)
    if not cases:
        raise wrong_layout(INFO, "no folder such as data/case_00000 or dataset/case_00000")
    tally = Tally()
    hospitals, silos = _sites(root, ALL_SITES), _sites(root, SILOS)
    clinical = _clinical([root, *{case.parent for case in cases}])
    rows: dict[str, Row] = {}
    for case in cases:
        file = nifti_file(case, "imaging")
        if file is None:
            tally.add("case(s) left out: no imaging.nii.gz (2019 and 2023 download it apart)")
            continue
        number = int(case.name[5:])
        masks = outlines(root, case, "segmentation")
        tally.add("case(s) without outlines (part of them is the challenge's test)", int(not masks))
        silo = silos.get(number, "")
        facts = {**clinical.get(number, {}), **({"silo": silo} if silo else {})}
        labels = {"malignant": facts.pop("malignant")} if "malignant" in facts else {}
        tally.add("case(s) left out: a copy lies in another folder", int(case.name in rows))
        rows.setdefault(
            case.name,
            Row(
                scan=case.name,
                patient=case.name,
                modality="CT",
                source=Source(below(root, file), "nifti"),
                site=hospitals.get(number, silo),
                labels=labels,
                masks=masks,
                facts=facts,
            ),
        )
    if not rows:
        raise wrong_layout(INFO, "no file imaging.nii.gz in any case")
    tally.add("case(s) of unknown site: in no table", sum(not row.site for row in rows.values()))
    return sorted_rows(list(rows.values()), tally.lines)


def _sites(root: Path, name: str) -> dict[int, str]:
    """Site by the number of the case; empty without the table."""
    folders = (root, root / "metadata", root / "fed_kits19" / "metadata")
    file = next((folder / name for folder in folders if (folder / name).is_file()), None)
    table = {}
    for cells in read_table(file) if file is not None else ():
        case = cells.get("case_ids") or cells.get("case") or cells.get("case_id") or ""
        number = re.search(r"(\d+)$", number_text(case))
        site = number_text(cells.get("site_ids") or cells.get("site_id") or cells.get("site") or "")
        if number and site:
            table[int(number[1])] = site
    return table


def _clinical(folders: list[Path]) -> dict[int, Mapping[str, str]]:
    """What ``kits.json`` says of each case; empty where it is missing or damaged."""
    file = next((each / "kits.json" for each in folders if (each / "kits.json").is_file()), None)
    try:
        said: Any = json.loads(file.read_text(encoding="utf-8")) if file is not None else []
    except (OSError, ValueError):
        said = []
    found: dict[int, Mapping[str, str]] = {}
    for each in said if isinstance(said, list) else ():
        number = (
            re.fullmatch(_CASE, str(each.get("case_id", ""))) if isinstance(each, dict) else None
        )
        if number:
            found[int(number[1])] = _facts(each)
    return found


def _facts(each: dict[str, Any]) -> dict[str, str]:
    facts = {}
    if isinstance(each.get("malignant"), bool):
        facts["malignant"] = "yes" if each["malignant"] else "no"
    for key, name in (
        ("gender", "sex"),
        ("age_at_nephrectomy", "age"),
        ("tumor_histologic_subtype", "histology"),
    ):
        if each.get(key) not in (None, ""):
            facts[name] = str(each[key])
    return facts


ADAPTER = Adapter(INFO, read)
