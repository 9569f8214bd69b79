"""Fine-tune an encoder on labelled scans, and hand it on as a MONAI bundle."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from agssd_core.config import Cohort, RunConfig
from agssd_core.config.finetune import FinetuneConfig
from agssd_core.config.tasks import TaskConfig
from agssd_core.console import Bar
from agssd_core.errors import DataError
from agssd_core.evaluation.bundle import record_results, write_bundle
from agssd_core.evaluation.bundle_data import write_bundle_data
from agssd_core.evaluation.bundle_facts import BundleFacts
from agssd_core.evaluation.finetune import Finetuned, finetune
from agssd_core.evaluation.finetune_pictures import draw_predictions
from agssd_core.evaluation.labelled import LabelledSet
from agssd_core.evaluation.labelled_scans import write_labelled
from agssd_core.evaluation.sources import ScanSource
from agssd_core.weights import Weights, write_bytes, write_text

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
class Encoder:
    """Weights of student, teacher and state, how they were trained, and where they come from."""

    weights: Weights = field(repr=False)
    config: RunConfig
    origin: str


@dataclass(frozen=True)
class Material:
    """Labelled scans, and what the bundle says of them.

    Attributes:
        name: for files; title and licence: in words.
        structures: value of a mask -> name, where known.
    """

    name: str
    title: str
    licence: str
    sources: Sequence[ScanSource] = field(repr=False)
    structures: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What ``finetune_encoder`` wrote.

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


def finetune_encoder(
    encoder: Encoder, material: Material, out: Path, request: Request, *, bar: Bar
) -> Report:
    """Prepare, train, write the bundle, and run it for the numbers that are reported.

    Args:
        encoder: to start from, unless the request says from scratch.
        material: scans of the other cohort are left out.
        out: gets ``labelled`` (prepared scans), ``data`` (held-out images), ``bundle``, ``report``.
        request: what is to be learned.
        bar: makes a progress bar by its title.

    Raises:
        DataError: no scan answers the task, or the bundle cannot be run.
        WeightsError: the checkpoint holds no encoder.
    """
    config = encoder.config
    modalities = ("US",) if config.federation.cohort == "us" else ("CT", "MR")
    usable = [one for one in material.sources if one.modality in modalities]
    if not usable:
        raise DataError(
            f"the labelled ones hold no scan of {' or '.join(modalities)}, which the encoder of "
            f"cohort {config.federation.cohort} reads. Name other scans, or another cohort."
        )
    task = _task(material.name, request)
    with bar("prepare scans") as told:
        scans = write_labelled(usable, config.data, out / "labelled", progress=told)
    weights = None if request.from_scratch else encoder.weights
    with bar("fine-tune") as told:
        done = _learned(scans, task, weights, config, request, told)
    held_out = scans.of(task).test
    with bar("held-out images") as told:
        items = write_bundle_data(
            usable, held_out.scans, task, out / "data", classes=done.classes, progress=told
        )
    origin = "random weights" if request.from_scratch else encoder.origin
    facts = _facts(done, scans, task, origin, material)
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
    material: Material,
) -> BundleFacts:
    learned = set(done.trained_on)
    sites = Counter(scan.site for scan in scans.scans if scan.scan in learned)
    names = done.classes
    if task.kind == "segmentation":
        named = tuple(
            material.structures.get(value, f"structure {value}") for value in task.structures
        )
        names = named or ("any structure",)
    return BundleFacts(
        dataset=material.title,
        licence=material.licence,
        names=names,
        encoder=origin,
        training=dict(sorted(sites.items())),
    )


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
