"""A round on several GPUs of one site: a job folder, and processes on this machine.

``train_on_processes`` writes the job, starts ``agssd_core.training.ranks`` and reads the answer.
The ranks find each other by a file in the job folder. torchrun would listen on every interface of
the machine meanwhile, on ports that anybody may write to. Rank 0 alone writes.
"""

import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from agssd_core.config import RunConfig, config_from_json
from agssd_core.data.cache import SiteVolumes
from agssd_core.errors import AgssdError, CheckpointError, CollapseError, TrainingError
from agssd_core.processes import Child, python_module
from agssd_core.training.checkpoint import StateStamp
from agssd_core.training.site_round import SiteTrainer
from agssd_core.weights import Weights, load_weights, save_weights, write_text

log = logging.getLogger(__name__)

_JOB, _METRICS, _FAILURE, _LOG = "job.json", "metrics.json", "failure.json", "processes.log"
_BASE, _RESULT, _MEETING = "base.safetensors", "result.safetensors", "meeting"
_POLL_S = 0.1


@dataclass(frozen=True)
class RoundJob:
    """One round at one site, as plain data.

    Attributes:
        config: canonical JSON of the RunConfig.
        site, sites: as ``SiteTrainer``.
        site_dir: the site's folder with its prepared volumes.
        first_step, steps, total_steps: as ``SiteTrainer.train_steps``.
        state_dir: where optimiser and monitor are kept; None keeps nothing.
        before, after: stamps to load and to save that state under; None skips it.
        patients: pseudonyms to train on; None is all.
    """

    config: str
    site: str
    sites: int
    site_dir: str
    first_step: int
    steps: int
    total_steps: int
    state_dir: str | None = None
    before: StateStamp | None = None
    after: StateStamp | None = None
    patients: tuple[str, ...] | None = None


def visible_processes(config: RunConfig) -> int:
    """How many processes a round uses: as configured, or one per GPU that the batch divides by.

    Raises:
        TrainingError: more processes are asked for than there are GPUs to train on.
    """
    training = config.training
    if config.privacy.enabled:
        return 1  # one draw of patients, one noise
    gpus = torch.cuda.device_count() if _on_gpus(config) else 0
    if training.processes:
        if gpus and training.processes > gpus:
            raise TrainingError(
                f"training.processes = {training.processes}, but this site has {gpus} visible "
                "GPU(s). Use training.processes = 0, or training.device = cpu."
            )
        return training.processes
    return next((count for count in range(gpus, 0, -1) if training.shared_by(count)), 1)


def _on_gpus(config: RunConfig) -> bool:
    return config.training.device != "cpu" and torch.cuda.is_available()


def train_on_processes(
    job: RoundJob, weights: Weights, folder: Path, *, processes: int, timeout_s: float | None = None
) -> tuple[Weights, dict[str, float]]:
    """Run a round on several processes of this machine and wait for it.

    Args:
        job: what to train.
        weights: merged weights to start from.
        folder: an empty folder for the exchange; the caller removes it.
        processes: ranks to start, one a GPU.
        timeout_s: give up after this long; None waits.

    Returns:
        The round's weights and metrics, as one process would give them.

    Raises:
        TrainingError: a process failed or did not end in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / _BASE, weights)
    write_text(folder / _JOB, json.dumps(asdict(job)), private=True)
    command = [*python_module("agssd_core.training.ranks"), str(folder), str(processes)]
    code = _run(command, folder / _LOG, timeout_s)
    if code is None:
        raise TrainingError(
            f"the {processes} training processes did not end within {timeout_s} s and were "
            "stopped. Raise the deadline, or order fewer steps a round."
        )
    if code != 0 or not (folder / _METRICS).is_file():
        log.error("training processes: %s", (folder / _LOG).read_text(errors="replace")[-4000:])
        raise _failure(folder, processes)
    metrics = json.loads((folder / _METRICS).read_text(encoding="utf-8"))
    return load_weights(folder / _RESULT), metrics


def _run(command: list[str], log_file: Path, timeout_s: float | None) -> int | None:
    """Exit code of a command; None when it had to be stopped. Nothing of it is left running."""
    # The ranks talk to each other only, so not over the hospital's network.
    local = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    environment = {**(local if sys.platform == "linux" else {}), **os.environ}
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with Child(command, environment=environment, log_file=log_file) as child:
        while (code := child.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                return None
            time.sleep(_POLL_S)
    return code


def run_rank(rank: int, folder: Path, processes: int) -> None:
    """One rank's part of a job."""
    job = _read_job(folder)
    config = config_from_json(job.config)
    store = dist.FileStore(str(folder / _MEETING), processes)  # type: ignore[attr-defined]
    kind = "nccl" if _on_gpus(config) else "gloo"
    dist.init_process_group(kind, store=store, rank=rank, world_size=processes)
    try:
        _train(job, config, folder)
    except AgssdError as error:
        write_text(folder / _FAILURE, json.dumps([type(error).__name__, str(error)]))
        raise
    finally:
        dist.destroy_process_group()


def _train(job: RoundJob, config: RunConfig, folder: Path) -> None:
    if _on_gpus(config):
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    volumes = SiteVolumes.open(Path(job.site_dir), config.data)
    if job.patients is not None:
        volumes = volumes.keep(frozenset(job.patients))
    trainer = SiteTrainer(config, volumes, site=job.site, sites=job.sites)
    base = load_weights(folder / _BASE)
    trainer.load(base)
    state_dir = None if job.state_dir is None else Path(job.state_dir)
    if state_dir is not None and job.before is not None:
        trainer.load_state(state_dir, job.before)
        trainer.load(base)  # a state may bring a local teacher; what the job says stands
    metrics = trainer.train_steps(job.first_step, job.steps, job.total_steps)
    if dist.get_rank() != 0:
        return
    if state_dir is not None and job.after is not None:
        trainer.save_state(state_dir, job.after)
    save_weights(folder / _RESULT, trainer.shared_weights())
    write_text(folder / _METRICS, json.dumps(metrics))


def _read_job(folder: Path) -> RoundJob:
    try:
        content = json.loads((folder / _JOB).read_text(encoding="utf-8"))
        job = RoundJob(**content)
        stamps = {
            name: None if content[name] is None else StateStamp(**content[name])
            for name in ("before", "after")
        }
        patients = None if job.patients is None else tuple(job.patients)
    except (OSError, ValueError, TypeError, KeyError):
        raise CheckpointError(
            "the job folder holds no readable job.json. Start the round again from its site."
        ) from None
    return replace(job, patients=patients, **stamps)  # type: ignore[arg-type]


def _failure(folder: Path, processes: int) -> TrainingError:
    noted = folder / _FAILURE
    if noted.is_file():
        name, text = json.loads(noted.read_text(encoding="utf-8"))
        return CollapseError(text) if name == CollapseError.__name__ else TrainingError(text)
    return TrainingError(
        f"one of {processes} training processes ended unexpectedly; weights were left as they "
        "were. The site's log holds its last words; try training.processes = 1 to tell them apart."
    )
