"""Take an encoder out of what a site holds: its own newest round, or a delivered checkpoint."""

import json
from pathlib import Path
from typing import Literal

from agssd_core.config import config_from_json
from agssd_core.errors import CheckpointError
from agssd_core.evaluation.export import ExportFormat, export_encoder
from agssd_core.training.build import model_shape
from agssd_core.weights import Weights, file_digest, group, load_weights
from client.memory import RunMemory

_WEIGHTS, _MANIFEST = "weights.safetensors", "manifest.json"


def export_held(
    place: Path,
    out: Path,
    *,
    run: str,
    network: Literal["teacher", "student"],
    form: ExportFormat,
) -> int:
    """Write an encoder that this site holds.

    Args:
        place: a site's folder, or a checkpoint's folder that the coordinator delivered.
        out: file to write.
        run: which run of the site; empty when it took part in one only.
        network: teacher or student.
        form: names and shapes of the arrays.

    Returns:
        The round: of the checkpoint, or the newest that the site trained.

    Raises:
        CheckpointError: nothing is there, it is damaged, or the network stayed elsewhere.
        ConfigError: the format does not fit the encoder.
    """
    if (place / _MANIFEST).is_file():
        number, config_text, weights = _delivered(place)
    else:
        number, config_text, weights = _own(place, run)
    if not group(weights, network):
        raise CheckpointError(
            f"the site does not hold the {network}: in this run the server keeps it. Use "
            "--network student, or a checkpoint delivered by the coordinator."
        )
    shape = model_shape(config_from_json(config_text).agssd)
    export_encoder(weights, shape, network=network, form=form, out=out)
    return number


def _delivered(folder: Path) -> tuple[int, str, Weights]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        number, config = int(manifest["round"]), str(manifest["config"])
        expected = manifest["files"][_WEIGHTS]
        whole = file_digest(folder / _WEIGHTS) == expected
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(
            "the checkpoint is damaged: its files do not fit its manifest. Have it delivered again."
        )
    return number, config, load_weights(folder / _WEIGHTS)


def _own(site: Path, run: str) -> tuple[int, str, Weights]:
    runs = sorted(path.name for path in (site / "federation").glob("*") if path.is_dir())
    if not runs:
        raise CheckpointError(
            "the folder holds no round of any run. Take part in one with `agssd-site run`, or name "
            "a checkpoint's folder."
        )
    if not run and len(runs) > 1:
        raise CheckpointError(
            f"the site took part in {len(runs)} runs ({', '.join(runs)}). Name one with --run."
        )
    memory = RunMemory.of(site, run or runs[0])
    last, config = memory.last(), memory.config()
    if last is None or config is None:
        raise CheckpointError(
            f"the site has no whole round of this run; its runs are {', '.join(runs)}. Wait for a "
            "round to end, or name another with --run."
        )
    return last.round, config, memory.local(last.round)
