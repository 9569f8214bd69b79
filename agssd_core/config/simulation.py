"""What only the simulation on one machine needs."""

from typing import Literal, Self

from pydantic import Field, model_validator

from agssd_core.config.node import (
    Node,
    ScanModality,
    Size3,
    Spacing3,
    name_problem,
    require,
    within,
)

_VOLUME_FORMATS = ("dicom", "nifti")
_CLIP_FORMATS = ("dicom", "png", "video")


class PhantomSiteConfig(Node):
    """One phantom hospital: its modalities, scanner look, geometry and file formats.

    Attributes:
        format: CT and MR are written as ``dicom`` or ``nifti``; ultrasound as ``dicom`` (a
            multi-frame clip and a still), ``png`` (stills) or ``video`` (a clip and a still).
        size, spacing_mm: of CT and MR volumes.
        anatomy: what ultrasound shows: a ``heart`` in a fan, or a ``breast`` or ``muscle`` under a
            linear probe.
        clips: ultrasound clips and stills of one patient. frames: of one clip.
    """

    name: str
    modalities: tuple[ScanModality, ...] = ("CT",)
    format: Literal["dicom", "nifti", "png", "video"] = "nifti"
    patients: int = 8
    size: Size3 = (64, 64, 48)
    spacing_mm: Spacing3 = (4.0, 4.0, 5.0)
    scanner: Literal["a", "b", "c"] = "a"
    anatomy: Literal["heart", "breast", "muscle"] = "heart"
    clips: int = 2
    frames: int = 6

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                name_problem(self.name),
                within("phantoms.patients", self.patients, 1, 10000),
                *(within("phantoms.size", side, 16, 512) for side in self.size),
                *(within("phantoms.spacing_mm", side, 0.3, 20) for side in self.spacing_mm),
                within("phantoms.clips", self.clips, 1, 100),
                within("phantoms.frames", self.frames, 2, 1000),
                "" if self.modalities else "phantoms.modalities is empty. Name CT, MR or US.",
                *self._format_problems(),
            ]
        )
        return self

    def _format_problems(self) -> list[str]:
        found = []
        if "US" in self.modalities and self.format not in _CLIP_FORMATS:
            found.append(
                f"phantoms: {self.name} has ultrasound, which cannot be written as format = "
                f"{self.format}. Use one of {', '.join(_CLIP_FORMATS)}."
            )
        if {"CT", "MR"} & set(self.modalities) and self.format not in _VOLUME_FORMATS:
            found.append(
                f"phantoms: {self.name} has CT or MR, which cannot be written as format = "
                f"{self.format}. Use one of {', '.join(_VOLUME_FORMATS)}; dicom suits all three."
            )
        return found


class SimulationConfig(Node):
    """Phantoms and engine.

    Attributes:
        phantoms: the sites to invent when ``data.sites`` names none.
        allow_shared_patients: let a patient stand at more than one site (leaks between sites).
        engine: ``in-process`` or Flower's ``ray``.
        split: folder that `agssd-sim split` wrote, whose sites train; in no dump, as other paths.
        lpsam: fitted LP-SAM file that delineates every ultrasound site; without one superpixels do.
            As other paths it is in no dump.
        lpsam_digest: SHA-256 that the file must have; empty takes the file as it is.
    """

    engine: Literal["in-process", "ray"] = "in-process"
    phantoms: tuple[PhantomSiteConfig, ...] = ()
    allow_shared_patients: bool = False
    workers: int = 2
    split: str = Field(default="", exclude=True)
    lpsam: str = Field(default="", exclude=True)
    lpsam_digest: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [site.name for site in self.phantoms]
        twice = sorted({name for name in names if names.count(name) > 1})
        require([f"site name {name!r} is used twice. Give each site its own." for name in twice])
        return self
