"""How scans are read and cached."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from agssd_core.config.frames import FramesConfig
from agssd_core.config.node import (
    Node,
    Range2,
    ScanModality,
    Spacing3,
    name_problem,
    ordered,
    require,
    within,
)


class SiteFoldersConfig(Node):
    """One simulated site made of folders: raw scans, or one that ``agssd-site`` has indexed.

    Attributes:
        paths: folders of raw scans, or a single prepared site.
        modalities: scans of other modalities are left out.
        patients: as the source names them (PatientID, or a folder's or file's name); empty is all.
        vendors: such as ``GE`` or ``Siemens``, where a scan says it; empty is all.
    """

    name: str
    paths: tuple[str, ...]
    modalities: tuple[ScanModality, ...] = ("CT", "MR", "US")
    patients: tuple[str, ...] = ()
    vendors: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        missing = "" if self.paths else f"data.sites: {self.name} has no paths. Name a folder."
        require([name_problem(self.name), missing])
        return self


class DataConfig(Node):
    """Preprocessing; the digest of the volumes' part is stamped on every cached volume.

    Attributes:
        spacing_mm: voxel spacing of the cached volume, in RAS order.
        ct_window_hu: CT values that map to 0 and 1.
        mr_percentiles: percentiles of the MR foreground that map to 0 and 1.
        foreground_margin: voxels added on each side of the body's bounding box.
        chunk: edge of one compressed chunk of the cache, voxels.
        frames: preprocessing of ultrasound.
        sites: folders that a simulation uses instead of phantoms: a list of folders, a mapping
            of name to folder(s), or full entries. Paths never leave the machine, so no dump of
            the configuration holds them.
    """

    spacing_mm: Spacing3 = (1.5, 1.5, 1.5)
    ct_window_hu: Range2 = (-1000.0, 1000.0)
    mr_percentiles: Range2 = (0.5, 99.5)
    foreground_margin: int = 8
    chunk: int = 64
    frames: FramesConfig = FramesConfig()
    sites: tuple[SiteFoldersConfig, ...] = Field(default=(), exclude=True)

    @field_validator("sites", mode="before")
    @classmethod
    def _expand(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            return [_entry(name, paths) for name, paths in given.items()]
        if isinstance(given, (list, tuple)):
            return [_entry(Path(e).name, e) if isinstance(e, str) else e for e in given]
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [site.name for site in self.sites]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(
            [
                *(f"data.sites: {name!r} stands twice. Name each site once." for name in twice),
                *(within("data.spacing_mm", side, 0.1, 20.0) for side in self.spacing_mm),
                ordered("data.ct_window_hu", self.ct_window_hu, -32768, 32767),
                ordered("data.mr_percentiles", self.mr_percentiles, 0, 100),
                within("data.foreground_margin", self.foreground_margin, 0, 64),
                within("data.chunk", self.chunk, 8, 512),
            ]
        )
        return self


def _entry(name: Any, paths: Any) -> Any:
    if isinstance(paths, Mapping):
        return {"name": str(name), **paths}
    return {"name": str(name), "paths": [paths] if isinstance(paths, str) else paths}
