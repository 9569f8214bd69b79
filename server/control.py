"""Pause, resume and stop a run between two rounds, by a file in the run's folder."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from agssd_core.errors import ConfigError
from agssd_core.weights import write_text

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
