"""The whole configuration of a run."""

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from agssd_core.config.agssd import AgssdConfig, TeacherConfig
from agssd_core.config.anaus import AnausConfig
from agssd_core.config.central_privacy import central_problems
from agssd_core.config.compare import CompareConfig
from agssd_core.config.data import DataConfig
from agssd_core.config.federation import Cohort, FederationConfig
from agssd_core.config.frames import FramesConfig
from agssd_core.config.init import InitConfig
from agssd_core.config.lpsam import LpsamConfig
from agssd_core.config.node import Node, require, within
from agssd_core.config.privacy import PrivacyConfig, privacy_problems
from agssd_core.config.simulation import SimulationConfig
from agssd_core.config.training import MonitorConfig, TrackingConfig, TrainingConfig


class RunConfig(Node):
    """One run. ``preset`` fills what the file leaves out.

    Attributes:
        name: folder of the run under ``output``.
        threads: CPU threads of every process; part of the bits of the result.
        cohorts: models that are trained side by side: ``ct-mr`` by AG-SSD, ``us`` by ANAUS. A
            site takes part in those that it has scans for.
        compare: what `agssd-sim compare` does around such runs; no part of a run, so in no dump.
    """

    name: str = "agssd"
    preset: Literal["tiny", "small", "base"] = "small"
    seed: int = 0
    threads: int = 1
    output: str = "runs"
    cohorts: tuple[Cohort, ...] = ("ct-mr",)
    data: DataConfig = DataConfig()
    init: InitConfig = InitConfig()
    agssd: AgssdConfig = AgssdConfig()
    anaus: AnausConfig = AnausConfig()
    lpsam: LpsamConfig = LpsamConfig()
    training: TrainingConfig = TrainingConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    monitor: MonitorConfig = MonitorConfig()
    tracking: TrackingConfig = TrackingConfig()
    federation: FederationConfig = FederationConfig()
    simulation: SimulationConfig = SimulationConfig()
    compare: CompareConfig = Field(default=CompareConfig(), exclude=True)

    def for_cohort(self, name: Cohort) -> "RunConfig":
        """One cohort's own configuration; nothing in it depends on the other's method.

        ``federation`` holds the cohort's name and its rounds and rules (``anaus.federation``,
        where given, for ``us``); the other method stands at its defaults.
        """
        if name == "us":
            rules = self.anaus.federation or self.federation
            agssd, anaus = AgssdConfig(), self.anaus.model_copy(update={"federation": None})
            data = DataConfig(frames=self.data.frames, sites=self.data.sites)
        else:
            rules, agssd, anaus = self.federation, self.agssd, AnausConfig()
            data = self.data.model_copy(update={"frames": FramesConfig()})
        changed = {
            "cohorts": (name,),
            "federation": rules.model_copy(update={"cohort": name}),
            "data": data,
            "init": self.init.of(name),
            "agssd": agssd,
            "anaus": anaus,
            "lpsam": LpsamConfig(),  # fitted and used outside a run
        }
        return self.model_copy(update=changed)

    @property
    def teacher(self) -> TeacherConfig:
        """The teacher's momentum in the cohort that ``federation.cohort`` names."""
        return self.anaus.teacher if self.federation.cohort == "us" else self.agssd.teacher

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                ""
                if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name)
                else f"name = {self.name!r} may hold letters, digits, '.', '-' and '_'.",
                within("threads", self.threads, 1, 1024),
                within("seed", self.seed, 0, 2**31 - 1),
                *self._cohort_problems(),
                *self.init.problems(self.cohorts),
                *privacy_problems(self),
                *central_problems(self),
            ]
        )
        return self

    def _cohort_problems(self) -> list[str]:
        sites = len(self.data.sites) or len(self.simulation.phantoms)
        found = []
        if 0 < sites < self.federation.min_sites:
            found.append(
                f"federation.min_sites = {self.federation.min_sites} can never be reached by "
                f"{sites} sites. Lower it or add sites."
            )
        if not self.cohorts or len(set(self.cohorts)) < len(self.cohorts):
            found.append("cohorts names none, or one twice. Use cohorts: [ct-mr].")
        return found
