"""Take an encoder out of what a site holds: its own newest round, or a delivered checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path

from agssd_core.config import Cohort, RunConfig, config_from_json
from agssd_core.errors import CheckpointError
from agssd_core.evaluation.export import ExportFormat, export_encoder
from agssd_core.evaluation.export_file import Network
from agssd_core.training.checkpoint import StateStamp, read_site_state
from agssd_core.weights import Weights, file_digest, group, load_weights
from client.delivered import MANIFEST, WEIGHTS
from client.memory import LastRound, RunMemory

_STATE = "statistics/"


@dataclass(frozen=True)
class HeldEncoder:
    """A round's arrays, with the site's own running statistics when it trained them."""

    round: int
    config: RunConfig
    weights: Weights
    statistics: Weights


def export_held(
    place: Path,
    out: Path,
    *,
    run: str = "",
    cohort: Cohort | None = None,
    network: Network = "teacher",
    form: ExportFormat | None = None,
) -> tuple[int, ExportFormat]:
    """Write an encoder that this site holds.

    Args:
        place: a site's folder, or a checkpoint's folder that the coordinator delivered.
        out: file to write.
        run: which run of the site; empty when it took part in one only.
        cohort: of that run; None when the site took part in one only.
        network: teacher or student.
        form: names and shapes of the arrays; None is the cohort's MONAI form.

    Returns:
        The round, of the checkpoint or the newest that the site trained, and the form.

    Raises:
        CheckpointError: nothing is there, it is damaged, or the network stayed elsewhere.
        ConfigError: the format does not fit the encoder.
    """
    held = held_encoder(place, run=run, cohort=cohort)
    if not group(held.weights, network):
        raise CheckpointError(
            f"the site does not hold the {network}: in this run the server keeps it. Use "
            "--network student, or a checkpoint delivered by the coordinator."
        )
    chosen = export_encoder(
        held.weights,
        held.config,
        network=network,
        form=form,
        out=out,
        statistics=held.statistics,
    )
    return held.round, chosen


def held_encoder(place: Path, *, run: str = "", cohort: Cohort | None = None) -> HeldEncoder:
    """The networks of a delivered checkpoint's folder, or of a site's newest round.

    Raises:
        CheckpointError: as ``export_held``.
    """
    delivered = (place / MANIFEST).is_file()
    return _delivered(place, cohort) if delivered else _own(place, run, cohort)


def _delivered(folder: Path, cohort: Cohort | None) -> HeldEncoder:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        number, text = int(manifest["round"]), str(manifest["config"])
        expected = manifest["files"][WEIGHTS]
        whole = file_digest(folder / WEIGHTS) == expected
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(
            "the checkpoint is damaged: its files do not fit its manifest. Have it delivered again."
        )
    config = config_from_json(text)
    if cohort not in (None, config.federation.cohort):
        raise CheckpointError(
            f"the checkpoint is of cohort {config.federation.cohort}, not {cohort}. Leave --cohort "
            "out, or have the other one delivered."
        )
    return HeldEncoder(number, config, load_weights(folder / WEIGHTS), {})


def _own(site: Path, run: str, cohort: Cohort | None) -> HeldEncoder:
    memory, others = _run_of(site, run, cohort)
    last, text = memory.last(), memory.config()
    if last is None or text is None:
        raise CheckpointError(
            f"the site has no whole round of this run; its runs are {', '.join(others)}. Wait for "
            "a round to end, or name another with --run."
        )
    config = config_from_json(text)
    return HeldEncoder(
        last.round, config, memory.local(last.round), _statistics(memory, last, config)
    )


def _statistics(memory: RunMemory, last: LastRound, config: RunConfig) -> Weights:
    """The site's own running statistics of BatchNorm; nothing where the encoder has none."""
    if config.federation.cohort != "us" or config.anaus.backbone.norm != "batch":
        return {}
    stamp = StateStamp(memory.folder.name, last.round, last.plan_hash)
    state = read_site_state(memory.state_folder(last.round), stamp)
    arrays = {} if state is None else state.arrays
    return {n.removeprefix(_STATE): a for n, a in arrays.items() if n.startswith(_STATE)}


def _run_of(site: Path, run: str, cohort: Cohort | None) -> tuple[RunMemory, list[str]]:
    """The run that is meant, and the names of all that the site took part in."""
    folders = (path for path in (site / "federation").glob("*") if path.is_dir())
    cohorts = {path.name: RunMemory(path).cohort() for path in sorted(folders)}
    if not cohorts:
        raise CheckpointError(
            "the folder holds no round of any run. Take part in one with `agssd-site run`, or name "
            "a checkpoint's folder."
        )
    names = [run] if run else list(cohorts)
    meant = [name for name in names if cohort in (None, cohorts.get(name))]
    if len(meant) == 1:
        return RunMemory.of(site, meant[0]), list(cohorts)
    listed = ", ".join(f"{name} of cohort {of or 'unknown'}" for name, of in cohorts.items())
    if not meant:
        raise CheckpointError(
            f"the site took part in no such run of cohort {cohort}; its runs are {listed}. Choose "
            "another --cohort or --run."
        )
    raise CheckpointError(
        f"the site took part in {len(meant)} runs that this may mean; its runs are {listed}. Name "
        "one with --run or --cohort."
    )
