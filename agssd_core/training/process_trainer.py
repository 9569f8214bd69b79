"""A site's trainer whose steps run in several processes, one a GPU.

It keeps weights and training state between rounds and gives each round to ``worker``. Its state
on disk is that of ``SiteTrainer``, so a site may change the number of its processes.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from agssd_core.config import RunConfig, dump_config
from agssd_core.errors import TrainingError
from agssd_core.training.checkpoint import (
    SiteState,
    StateStamp,
    read_site_state,
    recover_site_state,
    save_site_state,
)
from agssd_core.training.worker import RoundJob, train_on_processes
from agssd_core.weights import Weights

# Between this process and its ranks; what a site keeps bears the stamp of its run.
_BEFORE, _AFTER = StateStamp("job", 0, "before"), StateStamp("job", 0, "after")


class ProcessTrainer:
    """Trains as ``SiteTrainer`` does, with the batch shared by processes.

    Args:
        config: the run's configuration.
        site_dir: the site's folder with its prepared volumes; each process opens them itself.
        site: enrolled name; part of every seed.
        processes: how many, 2 or more.
        sites: sites of a round, for the learning-rate rule.
    """

    def __init__(
        self, config: RunConfig, site_dir: Path, *, site: str, processes: int, sites: int = 1
    ) -> None:
        self.config, self.site_dir, self.site = config, site_dir, site
        self.processes, self.sites = processes, sites
        self._weights: Weights = {}
        self._state: SiteState | None = None
        self._keeps_teacher = config.federation.merge.teacher_rule == "local"

    def load(self, weights: Weights) -> None:
        """Start a round from merged weights; a teacher at the site stays when they bring none."""
        teacher = _teacher(self._weights) if not _teacher(weights) else {}
        self._weights = {name: array.copy() for name, array in {**teacher, **weights}.items()}

    def shared_weights(self) -> Weights:
        """Copies of student, teacher and running state."""
        return {name: array.copy() for name, array in self._weights.items()}

    def train_steps(self, first_step: int, steps: int, total_steps: int) -> dict[str, float]:
        """Take the steps in ``processes`` processes of this machine and wait for them.

        Raises:
            TrainingError: as ``SiteTrainer``, or a process ended unexpectedly. Weights and state
                are then those from before.
        """
        with _job_folder(self.site_dir) as folder:
            kept = folder / "state"
            if self._state is not None:
                save_site_state(kept, self._state, _BEFORE)
            job = RoundJob(
                config=dump_config(self.config),
                site=self.site,
                sites=self.sites,
                site_dir=str(self.site_dir),
                first_step=first_step,
                steps=steps,
                total_steps=total_steps,
                state_dir=str(kept),
                before=None if self._state is None else _BEFORE,
                after=_AFTER,
            )
            weights, metrics = train_on_processes(
                job, self._weights, folder / "exchange", processes=self.processes
            )
            self._weights, self._state = weights, read_site_state(kept, _AFTER)
        return metrics

    def save_state(self, folder: Path, stamp: StateStamp) -> None:
        """Keep on disk what ``SiteTrainer`` would keep.

        Raises:
            CheckpointError: the state could not be written.
            TrainingError: no step was taken yet, so there is none.
        """
        if self._state is None:
            raise TrainingError("there is no training state before the first step. Train first.")
        save_site_state(folder, self._state, stamp)

    def load_state(self, folder: Path, stamp: StateStamp) -> bool:
        """Continue from a state under the same stamp; False, and a warm-up again, without one."""
        self._state = recover_site_state(folder, stamp)
        if self._state is not None and self._keeps_teacher:
            self._weights |= _teacher(self._state.arrays)
        return self._state is not None


@contextmanager
def _job_folder(site_dir: Path) -> Iterator[Path]:
    """A private folder on the site's own disk, as it holds optimiser state; gone afterwards."""
    parent = site_dir / "federation"
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(".job-*"):
        owner = re.match(r"\.job-(\d+)-", left.name)
        if owner and not psutil.pid_exists(int(owner[1])):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".job-{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _teacher(weights: Weights) -> Weights:
    return {name: array for name, array in weights.items() if name.startswith("teacher/")}
