"""Pause, resume and stop a run between two rounds, by a file in the run's folder."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from agssd_core.errors import ConfigError
from agssd_core.weights import write_text
from server.loop import RoundLoop

log = logging.getLogger(__name__)

State = Literal["go", "pause", "stop"]
_FILE = "control"


def set_state(folders: Iterable[Path], state: State) -> None:
    """Ask the cohorts of a run for a state; it takes effect when their round closes.

    Args:
        folders: of the run's cohorts.
        state: which.

    Raises:
        ConfigError: a folder holds no run.
    """
    folders = list(folders)
    if not all((folder / "checkpoints").is_dir() for folder in folders):
        raise ConfigError("the folder holds no run. Name a folder under runs/.")
    for folder in folders:
        write_text(folder / _FILE, state + "\n")


def state_of(folder: Path) -> State:
    """The state that was asked of a cohort's folder; ``go`` when nobody asked."""
    try:
        text = (folder / _FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return "go"
    return next((state for state in get_args(State) if state == text), "go")


def may_go_on(loop: RoundLoop) -> bool:
    """Wait while the coordinator has paused the run; False when it shall stop here."""
    while (state := state_of(loop.store.folder)) == "pause":
        loop.board.enter("paused")
        loop.sleep(max(loop.config.federation.poll_s, 0.5))
    if state == "stop":
        loop.board.enter("stopped")
        log.info("%s: stopped between two rounds", loop.config.federation.cohort)
    return state == "go"
