"""What only the simulation on one machine needs."""

from typing import Literal, Self

from pydantic import model_validator

from agssd_core.config.node import (
    Node,
    ScanModality,
    Size3,
    Spacing3,
    name_problem,
    require,
    within,
)


class PhantomSiteConfig(Node):
    """One phantom hospital: its modalities, scanner look, geometry and file formats."""

    name: str
    modalities: tuple[ScanModality, ...] = ("CT",)
    format: Literal["dicom", "nifti"] = "nifti"
    patients: int = 8
    size: Size3 = (64, 64, 48)
    spacing_mm: Spacing3 = (4.0, 4.0, 5.0)
    scanner: Literal["a", "b", "c"] = "a"

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                name_problem(self.name),
                within("phantoms.patients", self.patients, 1, 10000),
                *(within("phantoms.size", side, 16, 512) for side in self.size),
                *(within("phantoms.spacing_mm", side, 0.3, 20) for side in self.spacing_mm),
                "" if self.modalities else "phantoms.modalities is empty. Name CT, MR or US.",
            ]
        )
        return self


class SimulationConfig(Node):
    """Phantoms and engine.

    Attributes:
        phantoms: the sites to invent when ``data.sites`` names none.
        allow_shared_patients: let a patient stand at more than one site (leaks between sites).
        engine: ``in-process`` or Flower's ``ray``.
    """

    engine: Literal["in-process", "ray"] = "in-process"
    phantoms: tuple[PhantomSiteConfig, ...] = ()
    allow_shared_patients: bool = False
    workers: int = 2

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [site.name for site in self.phantoms]
        twice = sorted({name for name in names if names.count(name) > 1})
        require([f"site name {name!r} is used twice. Give each site its own." for name in twice])
        return self
