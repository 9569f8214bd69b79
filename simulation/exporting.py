"""Take an encoder out of a run's checkpoint."""

from pathlib import Path
from typing import Literal

from agssd_core.config import config_from_json
from agssd_core.errors import CheckpointError
from agssd_core.evaluation.export import ExportFormat, export_encoder
from agssd_core.training.build import model_shape
from server.store import RunStore


def export_run(
    run: Path,
    out: Path,
    *,
    round_index: int | None,
    network: Literal["teacher", "student"],
    form: ExportFormat,
) -> int:
    """Write the encoder of one round of a run.

    Returns:
        The round it was taken from.

    Raises:
        CheckpointError: the run or the round does not exist, or is damaged.
        ConfigError: the format does not fit the encoder.
    """
    store = RunStore(run)
    checkpoint = store.latest(strict=True) if round_index is None else store.load(round_index)
    if checkpoint is None:
        raise CheckpointError(
            "the folder holds no checkpoint. Name a run's folder, such as runs/demo."
        )
    config = config_from_json(checkpoint.manifest.config)
    shape = model_shape(config.agssd)
    export_encoder(checkpoint.weights, shape, network=network, form=form, out=out)
    return checkpoint.round
