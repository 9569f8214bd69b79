"""What a NIfTI file's name and its BIDS sidecar say: patient, modality, mask or scan.

NIfTI headers name neither patient nor modality. Patient, first rule that fits: ``PatientID`` of
the sidecar; ``sub-XX`` in the name or a folder's name; the file's stem without words for
contrast and study, when what is left holds a digit (``patient01_study1_T1W`` -> ``patient01``);
the folder's name (``STS_002/CT_image`` -> ``STS_002``).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agssd_core.data.volume import Modality

CT_WORDS = frozenset({"ct", "ctac", "cta", "cect", "ncct", "ldct", "hrct"})
MR_WORDS = frozenset(
    {"mr", "mri", "t1", "t1w", "t1c", "t1ce", "t1gd", "t1n", "t2", "t2w", "t2f", "t2star", "flair"}
    | {"pd", "pdw", "dwi", "adc", "swi", "dixon", "mprage", "bold", "mra", "stir", "asl"}
)
OTHER_WORDS = frozenset({"pet", "suv", "nm", "spect"})
# At the end of a name: positron tomography and ultrasound; at its start (PT_07) the patient.
OTHER_ENDINGS = frozenset({"pt", "us"})
MASK_WORDS = frozenset(
    {"mask", "masks", "seg", "segs", "segmentation", "label", "labels", "gt", "roi", "dseg", "gtv"}
)
PLAIN_WORDS = frozenset({"image", "img", "imaging", "scan", "volume", "vol", "raw", "brain", "w"})
SIDECAR_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class NamedScan:
    """What could be learnt without opening the image. Empty text: not said."""

    patient: str
    modality: Modality | None
    other_modality: bool
    is_mask: bool
    manufacturer: str
    model: str


def describe_name(path: Path) -> NamedScan:
    """Read a NIfTI file's name and sidecar."""
    sidecar = read_sidecar(path.with_name(nifti_stem(path) + ".json"))
    words = _words(nifti_stem(path))
    said = str(sidecar.get("Modality", "")).casefold()
    folder = _words(path.parent.name)
    hints = [said] if said else [*words, *folder]
    endings = {*([said] if said else [*words[-1:], *folder[-1:]])}
    return NamedScan(
        patient=str(sidecar.get("PatientID", "")) or _patient(path, words),
        modality=_modality(hints),
        other_modality=any(hint in OTHER_WORDS for hint in hints) or bool(endings & OTHER_ENDINGS),
        is_mask=any(word in MASK_WORDS for word in words),
        manufacturer=str(sidecar.get("Manufacturer", "")),
        model=str(sidecar.get("ManufacturersModelName", "")),
    )


def nifti_stem(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.casefold()) if word]


def _modality(hints: list[str]) -> Modality | None:
    if any(hint in CT_WORDS for hint in hints):
        return "CT"
    return "MR" if any(hint in MR_WORDS for hint in hints) else None


def _patient(path: Path, words: list[str]) -> str:
    for part in (path.name, *reversed(path.parent.parts)):
        found = re.search(r"(?:^|_)sub-([A-Za-z0-9]+)", part)
        if found:
            return found.group(1)
    plain = CT_WORDS | MR_WORDS | PLAIN_WORDS
    kept = [
        word
        for word in words
        if word not in plain and not re.fullmatch(r"(study|ses|session|visit|tp|frame)\d*", word)
    ]
    stem = "_".join(kept)
    return stem if any(character.isdigit() for character in stem) else path.parent.name


def read_sidecar(file: Path) -> dict[str, Any]:
    """What a small JSON file says; empty where there is none or it is damaged."""
    try:
        if file.stat().st_size > SIDECAR_LIMIT_BYTES:
            return {}
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
