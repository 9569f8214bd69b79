"""How much memory a training step takes, measured by taking one in a process of its own."""

import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from agssd_core.config import RunConfig, config_from_json, dump_config
from agssd_core.processes import python_module

MEASURE_S = 180.0
_SMALL, _LARGE = 2, 4


@dataclass(frozen=True)
class StepMemory:
    """One step of a batch, on the CPU; bytes.

    Attributes:
        begun: held by the process with its libraries, before the model.
        peak: most that the process ever held.
        shared: student, teacher and state.
    """

    batch: int
    begun: int
    peak: int
    shared: int


@dataclass(frozen=True)
class Estimate:
    """What the configured batch will take beside the libraries; bytes. ``exact`` was measured."""

    needed: int
    shared: int
    exact: bool


def estimate_memory(site: Path, config: RunConfig, *, batch: int) -> Estimate | None:
    """Extrapolate from two small steps to a batch; None when they could not be taken in time.

    Args:
        site: prepared with this configuration.
        config: of one cohort.
        batch: images in one pass of one process.
    """
    sizes = (batch,) if batch <= _LARGE else (_SMALL, _LARGE)
    found = [one for size in sizes if (one := _measured(site, config, size)) is not None]
    if len(found) < len(sizes):
        return None
    first, last = found[0], found[-1]
    each = max(last.peak - first.peak, 0) / max(last.batch - first.batch, 1)
    needed = last.peak - last.begun + int(each * (batch - last.batch))
    return Estimate(needed, last.shared, exact=len(sizes) == 1)


def _measured(site: Path, config: RunConfig, batch: int) -> StepMemory | None:
    command = [*python_module("client.preflight_step"), str(site.resolve()), str(batch)]
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            command,
            input=dump_config(config),
            capture_output=True,
            text=True,
            timeout=MEASURE_S,
            check=True,
        )
        return StepMemory(**json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, OSError, ValueError, TypeError, IndexError):
        return None


def _with_batch(config: RunConfig, batch: int) -> RunConfig:
    training: dict[str, Any] = {"accumulate": 1, "processes": 1, "device": "cpu"}
    if config.federation.cohort == "us":
        anaus = config.anaus.model_copy(update={"batch_size": batch})
        config = config.model_copy(update={"anaus": anaus})
    else:
        training["batch_size"] = batch
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def take_step(site: Path, config: RunConfig, batch: int) -> StepMemory:
    """Take one step in this process and throw its result away."""
    import torch  # noqa: F401 - what is loaded anyway is no part of the step

    from client.workbench import AgssdWorkbench

    begun = psutil.Process().memory_info().rss
    trainer = AgssdWorkbench().trainer(site, _with_batch(config, batch), site="preflight")
    trainer.train_steps(0, 1, 1)
    shared = sum(array.nbytes for array in trainer.shared_weights().values())
    return StepMemory(batch, begun, _peak(), shared)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """``python -m client.preflight_step SITE BATCH`` with the configuration on stdin."""
    site, batch = Path(sys.argv[1]), int(sys.argv[2])
    found = take_step(site, config_from_json(sys.stdin.read()), batch)
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    main()
