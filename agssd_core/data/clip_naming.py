"""Whose image or video a file is, by its name and its sidecar; and whether it is a mask.

Image files name no patient. Patient, first rule that fits; *folder* is the nearest one that says
more than ``US``, ``images`` or ``cine``:

1. ``PatientID`` of a sidecar: ``NAME.json`` beside ``NAME.png``.
2. ``sub-XX`` in the file's name or a folder's.
3. A patient's number in the name, wherever it stands (``Reg_pat1Image_133043`` -> ``pat1``), or at
   its start in short (``S1_L20_step_025`` -> ``S1``, ``p6_push_01`` -> ``p6``); else in the
   folder's name.
4. A folder that is a code with a number of three digits and more, no date and no part of a data
   set (``STS_002/image_04`` -> ``STS_002``), or with any number where the file repeats the name
   (``ana-7/ana-7_02`` -> ``ana-7``).
5. A frame's name (``kidney/frame_012``, ``step_3``, ``slice7``): what is left without the frame, if
   that holds letters and a digit, else the folder and the one it lies in.
6. The file's stem without words like *image* and *crop*, if letters and digits are left
   (``benign (12)``).
7. Else the file itself within these folders (``busi/benign/0012``): two people are never taken for
   one, so the frames of one clip in a folder of plain numbers count as many. Name the folder
   ``sub-XX``, or write sidecars, to say otherwise.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from agssd_core.data.naming import MASK_WORDS, read_sidecar

# A folder of masks says nothing else (`trainval-mask`); data sets are called `BUSI_with_GT`.
MASK_FOLDER_WORDS = MASK_WORDS | {"ground", "truth", "groundtruth", "annotation", "annotations"}
SPLIT_WORDS = frozenset({"train", "training", "trainval", "val", "validation", "test", "all"})
IMAGE_FOLDER_WORDS = frozenset({"image", "images", "img", "imgs", "frames"})
PLAIN_FOLDERS = IMAGE_FOLDER_WORDS | {
    *("us", "usg", "ultrasound", "sono", "cine", "cines", "clip", "clips", "video", "videos"),
    *("loops", "stills", "png", "jpg", "jpeg", "mp4", "dicom", "raw", "original", "originals"),
}
OTHER_MODALITIES = frozenset(
    {"ct", "cta", "cbct", "mr", "mri", "pet", "spect", "xray", "cxr", "mammo", "mammography"}
)
ULTRASOUND_WORDS = frozenset({"us", "usg", "ultrasound", "sono", "echo"})
PATIENT = r"(?:patient|pat|participant|subject|subj|sub|volunteer|proband|case)"
# Letters may follow the number (pat1Image), none may go before the word (repeat1).
ANYWHERE = re.compile(rf"(?:^|[^a-z]){PATIENT}[ _-]?\d+", re.IGNORECASE)
AT_START = re.compile(r"^(?:s|p|pt|id)\d+(?![a-z0-9])", re.IGNORECASE)
CODE = re.compile(r"[a-z]{0,6}[-_ ]?\d{3,}", re.IGNORECASE)
DATA_SET = re.compile(
    r"(?:data|dataset|set|task|batch|part|fold|split|group|series|site|class|grade|train|test|val"
    r"|version|day|week|month|year|busi|ddti|camus)[-_ ]?\d+",
    re.IGNORECASE,
)
DATE = re.compile(r"(?:19|20)\d\d(?:[-_. ]?\d\d){0,2}|\d\d[-_. ]?\d\d[-_. ]?(?:19|20)\d\d")
FRAME = re.compile(
    r"(?<![a-z])(?:frames?|frm|fr|f|steps?|slices?)[ _-]*\(?\d+\)?(?![a-z0-9])", re.IGNORECASE
)
PLAIN = re.compile(
    r"(?<![a-z])(?:images?|img|imgs|pic|picture|photo|scan|screenshot|snapshot|still|video|vid|clip"
    r"|cine|loop|movie|crop|cropped|trim|trimmed|original|raw|anon|us|usg|ultrasound)(?![a-z])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class NamedClip:
    """What could be learnt without opening the file. Empty text: not said."""

    patient: str
    is_mask: bool
    other_modality: bool
    manufacturer: str
    model: str


def describe_clip(path: Path) -> NamedClip:
    """Read the name and sidecar of an image or a video."""
    sidecar = read_sidecar(path.with_suffix(".json")) or read_sidecar(
        path.with_name(path.name + ".json")
    )
    words, folder = _words(path.stem), _words(path.parent.name) - SPLIT_WORDS
    return NamedClip(
        patient=str(sidecar.get("PatientID") or "") or _patient(path),
        is_mask=bool(words & MASK_WORDS or (folder and folder <= MASK_FOLDER_WORDS)),
        other_modality=bool(words & OTHER_MODALITIES) and not words & ULTRASOUND_WORDS,
        manufacturer=str(sidecar.get("Manufacturer") or ""),
        model=str(sidecar.get("ManufacturersModelName") or ""),
    )


def _words(name: str) -> set[str]:
    return {word for word in re.split(r"[^a-z0-9]+", name.casefold()) if word}


def _patient(path: Path) -> str:
    for part in (path.name, *reversed(path.parent.parts)):
        found = re.search(r"(?:^|_)sub-([A-Za-z0-9]+)", part)
        if found:
            return found.group(1)
    stem, folders = path.stem, _folders(path)
    folder = folders[-1]
    named = _numbered(stem) or _numbered(folder)
    if named:
        return named
    if _is_person(folder, stem):
        return folder
    rest = FRAME.sub("", stem)
    left = _tidy(PLAIN.sub("", rest))
    if re.search(r"\d", left) and re.search(r"[^\W\d_]", left):
        return left
    if rest != stem and not re.search(r"\d", left):
        return "/".join(folders)
    return "/".join([*folders, left or stem])


def _folders(path: Path) -> list[str]:
    """Names of the nearest folders that say something, two at most, the nearest last."""
    names = [part for part in path.parent.parts if part.casefold() not in PLAIN_FOLDERS]
    return names[-2:] or [path.parent.name]


def _numbered(name: str) -> str:
    """The part of a name that counts patients, such as ``pat1`` or ``S12``."""
    found = ANYWHERE.search(name) or AT_START.search(name)
    return _tidy(found.group(0)) if found else ""


def _is_person(folder: str, stem: str) -> bool:
    """Whether a folder with a number is likelier a patient than a part of a data set."""
    if DATE.fullmatch(folder) or not re.search(r"\d", folder):
        return False
    if stem.casefold().startswith(folder.casefold()):
        return True
    year = re.search(r"(?<!\d)(?:19|20)\d\d$", folder)
    return bool(CODE.fullmatch(folder) and not DATA_SET.fullmatch(folder) and not year)


def _tidy(name: str) -> str:
    """Without separators at the ends and repeated ones inside."""
    return re.sub(r"([ _.-])[ _.-]+", r"\1", name).strip(" _.-")
