"""Take an encoder out of a run's checkpoint."""

from pathlib import Path

from agssd_core.config import Cohort, RunConfig, config_from_json
from agssd_core.errors import CheckpointError
from agssd_core.evaluation.export import ExportFormat, export_encoder
from agssd_core.evaluation.export_file import Network
from server.cohorts import run_folders
from server.manifest import Checkpoint
from server.store import RunStore


def export_run(
    run: Path,
    out: Path,
    *,
    cohort: Cohort | None = None,
    round_index: int | None = None,
    network: Network = "teacher",
    form: ExportFormat | None = None,
) -> tuple[int, ExportFormat]:
    """Write the encoder of one round of a run.

    Args:
        run: its folder.
        out: file to write.
        cohort: whose encoder; None is the only one of the run.
        round_index: None is the newest.
        network: teacher or student.
        form: None is the cohort's MONAI form.

    Returns:
        The round it was taken from, and the form.

    Raises:
        CheckpointError: the run, the cohort or the round does not exist, or is damaged.
        ConfigError: the format does not fit the encoder.
    """
    checkpoint, config = checkpoint_of(run, cohort, round_index=round_index)
    chosen = export_encoder(checkpoint.weights, config, network=network, form=form, out=out)
    return checkpoint.round, chosen


def checkpoint_of(
    run: Path, cohort: Cohort | None, *, round_index: int | None = None
) -> tuple[Checkpoint, RunConfig]:
    """One round of a run, and the configuration that it was trained with.

    Args:
        run: its folder.
        cohort: None is the only one of the run.
        round_index: None is the newest.

    Raises:
        CheckpointError: the run, the cohort or the round does not exist, or is damaged.
    """
    folders = run_folders(run)
    if len(folders) > 1 and cohort is None:
        raise CheckpointError(
            f"the run has {len(folders)} cohorts ({', '.join(folders)}). Name one with --cohort."
        )
    only = next(iter(folders.values()))
    store = RunStore(folders.get(cohort or "", only))
    checkpoint = store.latest(strict=True) if round_index is None else store.load(round_index)
    if checkpoint is None:
        raise CheckpointError(
            "the folder holds no checkpoint. Name a run's folder, such as runs/demo."
        )
    config = config_from_json(checkpoint.manifest.config)
    if cohort not in (None, config.federation.cohort):
        raise CheckpointError(
            f"the run has no cohort {cohort}, only {config.federation.cohort}. Name that with "
            "--cohort, or leave it out."
        )
    return checkpoint, config
