"""What a site needs of whoever opens its scans and trains on them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agssd_core.config import Cohort, RunConfig
from agssd_core.training.checkpoint import StateStamp
from agssd_core.weights import Weights


class Trainer(Protocol):
    """Trains at one site: ``SiteTrainer`` for volumes, ``AnausTrainer`` for ultrasound."""

    def load(self, weights: Weights) -> None:
        """Take student, teacher and state; optimiser and monitor stay as they are."""

    def shared_weights(self) -> Weights:
        """Copies of student, teacher and state."""
        ...

    def train_steps(self, first_step: int, steps: int, total_steps: int) -> dict[str, float]:
        """Take exactly ``steps`` optimiser steps; finite metrics."""
        ...

    def save_state(self, folder: Path, stamp: StateStamp) -> None:
        """Write optimiser, monitor window and counters."""

    def load_state(self, folder: Path, stamp: StateStamp) -> bool:
        """Read them back; False, and a warm-up again, when they are lost."""
        ...


@dataclass(frozen=True)
class SiteFacts:
    """What a site has for a cohort, from its catalogue: volumes, or clips of ultrasound."""

    patient_count: int
    volume_count: int


class Workbench(Protocol):
    """How a site opens its catalogue and its trainer."""

    def facts(self, folder: Path, cohort: Cohort) -> SiteFacts:
        """Read the catalogue's counts; no patient, and the site is not of the cohort."""
        ...

    def trainer(self, folder: Path, config: RunConfig, *, site: str) -> Trainer:
        """Open the cohort's prepared scans and build model and optimiser."""
        ...
