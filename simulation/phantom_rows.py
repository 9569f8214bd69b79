"""Phantom hospitals as a labelled data set: scans, outlines, and what can be asked of them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from agssd_core.config import PhantomSiteConfig, dump_config
from agssd_core.weights import write_text
from simulation.datasets.rows import DatasetRows, Mask, Row, Source, sorted_rows
from simulation.phantom_anatomy import LABEL_NAMES
from simulation.phantom_images import LOOKS
from simulation.phantom_ultrasound import US_LOOKS
from simulation.phantom_us_anatomy import US_LABEL_NAMES
from simulation.phantoms import write_phantom_site

# An organ counts as present from this share of the scan's voxels.
PRESENT_SHARE = 0.002
ORGANS = ("lung", "liver", "kidney", "heart", "brain")
US_STRUCTURES = ("lesion", "gland", "bone", "left ventricle", "left atrium")
MARK = "phantoms.json"
_LABELS = "labels"
Progress = Callable[[int, int], None]


def phantom_rows(
    folder: Path,
    sites: Sequence[PhantomSiteConfig],
    *,
    seed: int,
    progress: Progress | None = None,
) -> DatasetRows:
    """Write every site's scans and outlines below ``folder``, once, and list them.

    Labels of a volume: for every organ of ``ORGANS`` whether it is in the scan (``yes``, ``no``),
    and as ``ORGAN-size`` whether it takes more of it than in the median scan that shows it
    (``large``, ``small``). Labels of ultrasound: ``anatomy``, and of stills the same of
    ``US_STRUCTURES`` (``left-ventricle``, ``left-ventricle-size``). Outlines are the phantoms' own
    numbers; of ultrasound stills only.
    """
    mark = folder / MARK
    wanted = json.dumps({"seed": seed, "sites": [json.loads(dump_config(s)) for s in sites]})
    if not mark.is_file() or mark.read_text(encoding="utf-8") != wanted:
        for done, site in enumerate(sites, start=1):
            labels = folder / _LABELS / site.name
            write_phantom_site(folder / site.name, site, seed=seed, labels_folder=labels)
            if progress is not None:
                progress(done, len(sites))
        _flatten_outlines(folder / _LABELS)
        write_text(mark, wanted)
    volumes = [row for site in sites for row in _volumes(site)]
    clips = [row for site in sites for row in _clips(folder, site)]
    stills, films = [row for row in clips if row.masks], [row for row in clips if not row.masks]
    organs = {name: LABEL_NAMES.index(name) for name in ORGANS}
    structures = {name.replace(" ", "-"): US_LABEL_NAMES.index(name) for name in US_STRUCTURES}
    labelled = [
        *_with_labels(folder, volumes, organs, _volume),
        *_with_labels(folder, stills, structures, _still),
    ]
    return sorted_rows([*labelled, *films])


def _volumes(site: PhantomSiteConfig) -> Iterator[Row]:
    for number in range(site.patients):
        name = f"{site.name}-{number:04d}"
        for modality in site.modalities:
            if modality == "US":
                continue
            place = f"{site.name}/{name}/{modality}"
            outline = f"{_LABELS}/{site.name}/{name}_{modality}_labels.nii.gz"
            yield Row(
                scan=f"{name}-{modality}",
                patient=name,
                modality=modality,
                source=Source(place, "dicom")
                if site.format == "dicom"
                else Source(f"{place}_image.nii.gz", "nifti"),
                site=site.name,
                vendor=LOOKS[site.scanner].vendor,
                masks=(Mask(Source(outline, "nifti")),),
            )


def _clips(folder: Path, site: PhantomSiteConfig) -> Iterator[Row]:
    """Files of a site's ultrasound; a still has outlines."""
    if "US" not in site.modalities:
        return
    for number in range(site.patients):
        name = f"{site.name}-{number:04d}"
        place = folder / site.name / name / "US"
        for file in sorted(place.iterdir()):
            if file.suffix == ".json":
                continue
            path = file.relative_to(folder)
            outline = (Path(_LABELS) / site.name / path.relative_to(site.name)).with_suffix(".png")
            still = (folder / outline).is_file()
            kind = "dicom" if file.suffix == ".dcm" else "image" if still else "video"
            yield Row(
                scan=f"{name}-{file.stem}",
                patient=name,
                modality="US",
                source=Source(path.as_posix(), kind),  # type: ignore[arg-type]  # one of three
                site=site.name,
                vendor=US_LOOKS[site.scanner].vendor,
                labels={"anatomy": site.anatomy},
                masks=(Mask(Source(outline.as_posix(), "image")),) if still else (),
            )


def _flatten_outlines(labels: Path) -> None:
    """Write the outlines of stills as PNG too, as annotators save them."""
    for file in sorted(labels.rglob("*.npy")):
        maps: NDArray[np.uint8] = np.load(file, allow_pickle=False)
        if len(maps) == 1:
            Image.fromarray(maps[0]).save(file.with_suffix(".png"))


def _with_labels(
    folder: Path,
    rows: Sequence[Row],
    parts: Mapping[str, int],
    read: Callable[[Path], NDArray[np.uint8]],
) -> list[Row]:
    """Add whether each part, a number of the outlines, is there, and how large it is."""
    shares = [_shares(read(folder / row.masks[0].source.path), parts) for row in rows]
    medians = {}
    for part in parts:
        seen = [share[part] for share in shares if share[part] >= PRESENT_SHARE]
        medians[part] = float(np.median(seen)) if seen else 0.0
    return [
        Row(**{**row.__dict__, "labels": {**row.labels, **_labels(share, medians)}})
        for row, share in zip(rows, shares, strict=True)
    ]


def _labels(share: Mapping[str, float], medians: Mapping[str, float]) -> dict[str, str]:
    found = {part: "yes" if share[part] >= PRESENT_SHARE else "no" for part in share}
    for part in share:
        if found[part] == "yes":
            found[f"{part}-size"] = "large" if share[part] > medians[part] else "small"
    return found


def _shares(outlined: NDArray[np.uint8], parts: Mapping[str, int]) -> dict[str, float]:
    """Of each part in the voxels or pixels of a scan."""
    counts = np.bincount(outlined.ravel(), minlength=256) / outlined.size
    return {part: float(counts[number]) for part, number in parts.items()}


def _volume(file: Path) -> NDArray[np.uint8]:
    return np.asarray(nib.load(file).dataobj).astype(np.uint8)  # type: ignore[attr-defined]


def _still(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        return np.asarray(image, dtype=np.uint8)
