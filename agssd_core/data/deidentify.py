"""Drop what names a patient before anything is written.

Only the header fields of ``ALLOWED_KEYWORDS`` are ever decoded. Identifiers among them become
pseudonyms, HMAC-SHA256 under a secret that never leaves the site's folder; a plain hash could
be undone by trying every patient number.
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from agssd_core.errors import CatalogueError
from agssd_core.weights import write_text

IDENTIFIERS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
ALLOWED_KEYWORDS = (
    *IDENTIFIERS,
    "SOPClassUID",
    "Modality",
    "Manufacturer",
    "ManufacturerModelName",
    "ImageType",
    "BurnedInAnnotation",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelSpacing",
    "SpacingBetweenSlices",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    # Ultrasound: where the echoes lie, and how stored values are shown.
    "SequenceOfUltrasoundRegions",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
)
VENDORS = {
    "ge": "GE",
    "g.e": "GE",
    "general electric": "GE",
    "kretz": "GE",
    "kretztechnik": "GE",
    "philips": "Philips",
    "atl": "Philips",
    "siemens": "Siemens",
    "acuson": "Siemens",
    "canon": "Canon",
    "toshiba": "Canon",
    "sonosite": "SonoSite",
    "hitachi": "Hitachi",
    "aloka": "Hitachi",
    "fujifilm": "Hitachi",
    "hyperfine": "Hyperfine",
    "united imaging": "United Imaging",
    "uih": "United Imaging",
    "samsung": "Samsung",
    "medison": "Samsung",
    "mindray": "Mindray",
    "zonare": "Mindray",
    "esaote": "Esaote",
    "biosound": "Esaote",
    "telemed": "Telemed",
    "clarius": "Clarius",
    "butterfly": "Butterfly",
    "supersonic imagine": "SuperSonic Imagine",
    "hologic": "Hologic",
    "bk medical": "BK Medical",
    "b-k medical": "BK Medical",
    "sonoscape": "SonoScape",
    "chison": "Chison",
    "konica": "Konica Minolta",
    "verathon": "Verathon",
    "interson": "Interson",
    "terason": "Terason",
    "phantom": "Phantom",
}
SECRET_NAME = "secret.key"  # noqa: S105 - a file's name, not a secret
SECRET_BYTES = 32


class Pseudonymiser:
    """Turns identifiers into pseudonyms under one site's secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def key(self, kind: str, *parts: str) -> str:
        """A 16-digit pseudonym of these parts; ``kind`` keeps name spaces apart."""
        text = "\0".join((kind, *parts)).encode("utf-8", "surrogateescape")
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()[:16]

    def patient(self, identity: str) -> str:
        """Pseudonym of a patient; blanks and letter case do not matter."""
        return self.key("patient", " ".join(identity.split()).casefold())

    def reference(self, path: str) -> str:
        """Short public name of a skipped file."""
        return self.key("file", path)[:8]

    @property
    def fingerprint(self) -> str:
        """Tells whether two sites share a secret, without telling the secret."""
        return self.key("fingerprint")


def vendor_name(manufacturer: str) -> str:
    """Map free text to one of a few makers, so that nothing else slips through."""
    text = manufacturer.casefold()
    for start, name in VENDORS.items():
        if re.search(rf"\b{re.escape(start)}\b", text):
            return name
    return "other"


def scanner_model(text: str) -> str:
    """A scanner's model name, reduced to letters, digits and a few signs."""
    return re.sub(r"[^A-Za-z0-9 ._-]", "", text)[:32].strip()


def ensure_secret(site_dir: Path, secret: bytes | None = None) -> Pseudonymiser:
    """Read a site's secret, making it on first use.

    Args:
        site_dir: the site's folder.
        secret: use this one for a new site, so that sites on one machine agree on pseudonyms.

    Raises:
        CatalogueError: the secret is damaged, readable by others, or differs from ``secret``.
    """
    path = site_dir / "private" / SECRET_NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        value = secret or secrets.token_bytes(SECRET_BYTES)
        write_text(path, value.hex(), private=True)
    found = read_secret(site_dir)
    if secret is not None and not hmac.compare_digest(found, secret):
        raise CatalogueError(
            "the site's folder was made with another secret, so its pseudonyms differ. Index "
            "into a new folder."
        )
    return Pseudonymiser(found)


def read_secret(site_dir: Path) -> bytes:
    """The site's secret.

    Raises:
        CatalogueError: it is missing, damaged or readable by others.
    """
    path = site_dir / "private" / SECRET_NAME
    with suppress(OSError, ValueError):
        if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise CatalogueError(
                "the site's secret may be read by other users of this machine, only its owner "
                "may. Run `chmod 600` on private/secret.key in the site's folder."
            )
        value = bytes.fromhex(path.read_text(encoding="ascii").strip())
        if len(value) >= SECRET_BYTES:
            return value
    raise CatalogueError(
        "the site's secret is missing or damaged. Restore private/secret.key from a copy, or "
        "index into a new folder."
    )
