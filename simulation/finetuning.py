"""Fine-tune a run's encoder on a split of a public data set, and hand it on as a MONAI bundle."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from agssd_core.config import Cohort, RunConfig
from agssd_core.config.finetune import FinetuneConfig
from agssd_core.config.tasks import TaskConfig
from agssd_core.errors import DataError
from agssd_core.evaluation.bundle import record_results, write_bundle
from agssd_core.evaluation.bundle_facts import BundleFacts
from agssd_core.evaluation.finetune import Finetuned, finetune
from agssd_core.evaluation.finetune_pictures import draw_predictions
from agssd_core.evaluation.labelled import LabelledSet
from agssd_core.weights import Weights, write_bytes, write_text
from server.manifest import Checkpoint
from simulation.bundle_data import write_bundle_data
from simulation.datasets.known import ADAPTERS
from simulation.datasets.rows import DatasetInfo
from simulation.exporting import checkpoint_of
from simulation.labelled import write_labelled
from simulation.split import read_split

Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
_MAIN = ("mean_dice", "balanced_accuracy", "accuracy")


@dataclass(frozen=True)
class Request:
    """What is to be learned.

    Attributes:
        kind: of the task.
        label: of a classification. classes: that count; empty takes those found.
        structures: of a segmentation; empty takes every outlined value as one structure.
        fraction: of the training patients.
        cohort: whose encoder; None is the only one of the run.
        from_scratch: random weights in place of the encoder's, to compare with.
    """

    kind: Literal["segmentation", "classification"]
    label: str = ""
    classes: tuple[str, ...] = ()
    structures: tuple[int, ...] = ()
    fraction: float = 1.0
    seed: int = 0
    cohort: Cohort | None = None
    from_scratch: bool = False
    settings: FinetuneConfig = field(default_factory=FinetuneConfig)


@dataclass(frozen=True)
class Report:
    """What ``finetune_run`` wrote.

    Attributes:
        metrics: of the bundle on the held-out images' own pixels.
        per_site: its main metric for every site.
        failed: image -> reason, of the bundle. skipped: of preparing.
    """

    bundle: Path
    report: Path
    metrics: dict[str, float]
    per_site: dict[str, float]
    failed: dict[str, str]
    skipped: dict[str, str]


def finetune_run(encoder: Path, split: Path, out: Path, request: Request, *, bar: Bar) -> Report:
    """Prepare, train, write the bundle, and run it for the numbers that are reported.

    Args:
        encoder: folder of a run; its newest round counts.
        split: folder that ``agssd-sim split`` wrote.
        out: gets ``labelled`` (prepared scans), ``data`` (held-out images), ``bundle``, ``report``.
        request: what is to be learned.
        bar: makes a progress bar by its title.

    Raises:
        CheckpointError: the run holds no checkpoint of that cohort.
        DataError: the split is missing or damaged, or no scan answers the task.
        WeightsError: the checkpoint holds no encoder.
    """
    checkpoint, config = checkpoint_of(encoder, request.cohort)
    division, placed = read_split(split)
    modalities = ("US",) if config.federation.cohort == "us" else ("CT", "MR")
    usable = [one for one in placed if one.row.modality in modalities]
    if not usable:
        raise DataError(
            f"the split holds no scan of {' or '.join(modalities)}, which the encoder of cohort "
            f"{config.federation.cohort} reads. Name another data set, or another cohort."
        )
    root = division.root
    task = _task(division.name, request)
    with bar("prepare scans") as told:
        scans = write_labelled(root, usable, config.data, out / "labelled", progress=told)
    weights = None if request.from_scratch else checkpoint.weights
    with bar("fine-tune") as told:
        done = _learned(scans, task, weights, config, request, told)
    held_out = scans.of(task).test
    rows = [one.row for one in usable]
    with bar("held-out images") as told:
        items = write_bundle_data(
            root, rows, held_out.scans, task, out / "data", classes=done.classes, progress=told
        )
    origin = "random weights" if request.from_scratch else _origin(checkpoint, config)
    facts = _facts(done, scans, task, origin, division.name)
    write_bundle(out / "bundle", done, task, config.data, items, facts)
    found = run_bundle(out / "bundle")
    metrics = {name: found[name] for name in _MAIN if name in found}
    record_results(out / "bundle", metrics)
    per_site = _per_site(found["scans"])
    _write_report(out / "report", done, held_out, task, request, found | {"per_site": per_site})
    skipped, failed = dict(scans.skipped), found["failed"]
    return Report(out / "bundle", out / "report", metrics, per_site, failed, skipped)


def _learned(
    scans: LabelledSet,
    task: TaskConfig,
    weights: Weights | None,
    config: RunConfig,
    request: Request,
    told: Callable[[int, int], None],
) -> Finetuned:
    how, share, seed = request.settings, request.fraction, request.seed
    return finetune(scans, task, weights, config, how, fraction=share, seed=seed, progress=told)


def run_bundle(bundle: Path) -> dict[str, Any]:
    """Run a bundle as its users do, in a process of its own, and read what it measured.

    Raises:
        DataError: it ended with an error; its last line is quoted.
    """
    bundle = bundle.resolve()  # it runs in its own folder, from where a relative name leads astray
    config = bundle / "configs" / "inference.json"
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(config)]
    ended = subprocess.run(  # noqa: S603 - this interpreter, and a file that was just written
        command, cwd=bundle, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    metrics = bundle / "eval" / "metrics.json"
    if ended.returncode != 0 or not metrics.is_file():
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(
            f"the bundle was written but could not be run: {last[:200]}. Install the extra "
            "`research` of this package (MONAI's bundles need fire), then run it again."
        )
    found: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8"))
    return found


def _task(dataset: str, request: Request) -> TaskConfig:
    about = request.label if request.kind == "classification" else "structures"
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in f"{dataset}-{about}")
    return TaskConfig(
        name=plain[:40].strip("-") or "task",
        kind=request.kind,
        label=request.label,
        classes=request.classes,
        structures=request.structures,
    )


def _facts(
    done: Finetuned,
    scans: LabelledSet,
    task: TaskConfig,
    origin: str,
    dataset: str,
) -> BundleFacts:
    info = _info(dataset)
    learned = set(done.trained_on)
    sites = Counter(scan.site for scan in scans.scans if scan.scan in learned)
    names = done.classes
    if task.kind == "segmentation":
        known = {} if info is None else info.structures
        named = tuple(known.get(value, f"structure {value}") for value in task.structures)
        names = named or ("any structure",)
    return BundleFacts(
        dataset=dataset if info is None else info.title,
        licence="not recorded; ask its publisher" if info is None else info.licence,
        names=names,
        encoder=origin,
        training=dict(sorted(sites.items())),
    )


def _info(name: str) -> DatasetInfo | None:
    """Facts of a known data set; None of one that has no adapter."""
    adapter = ADAPTERS.get(name)
    return None if adapter is None else adapter.info


def _origin(checkpoint: Checkpoint, config: RunConfig) -> str:
    return f"round {checkpoint.round} of a federated run (cohort {config.federation.cohort})"


def _per_site(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean Dice or accuracy of every site."""
    found: dict[str, list[float]] = {}
    for row in rows:
        score = row["dice"] if "dice" in row else float(row["prediction"] == row["truth"])
        found.setdefault(row["site"], []).append(score)
    return {site: sum(scores) / len(scores) for site, scores in sorted(found.items())}


def _write_report(
    folder: Path,
    done: Finetuned,
    held_out: LabelledSet,
    task: TaskConfig,
    request: Request,
    found: dict[str, Any],
) -> None:
    text = {
        "bundle": found,
        "training_grid": asdict(done.outcome),
        "losses": done.losses,
        "trained_on": len(done.trained_on),
        "request": {**asdict(request), "settings": request.settings.model_dump(mode="json")},
    }
    write_text(folder / "metrics.json", json.dumps(text, indent=1, sort_keys=True, default=dict))
    picture = draw_predictions(done.predictor(), held_out, task, done.classes)
    write_bytes(folder / "predictions.png", picture)
