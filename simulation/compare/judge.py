"""Ask one encoder, or one control, every question of a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass

from agssd_core.config import RunConfig, TaskConfig, dump_config
from agssd_core.config.compare import Method
from agssd_core.evaluation.controls import IntensityControl, PositionControl
from agssd_core.evaluation.encoders import FeatureSource, open_encoder
from agssd_core.evaluation.finetune import finetune
from agssd_core.evaluation.probe import Features, extract, run_probe
from simulation.compare.data import SeedData
from simulation.compare.plan import Model, model_config, stamp_of
from simulation.compare.pretrain import Trained, judged_network, pretrain
from simulation.compare.results import Cell, Result, ResultFile, digest_of

CONTROLS = ("position", "intensity")


@dataclass(frozen=True)
class Job:
    """One model, or the control that ``control`` names, with all its cells."""

    settings: RunConfig
    data: SeedData
    model: Model | None = None
    control: str = ""


@dataclass(frozen=True)
class _Question:
    task: TaskConfig
    method: Method
    fraction: float


def cells_of(job: Job) -> list[Cell]:
    """The cells of a job, in the order in which they are computed."""
    return [cell for cell, _ in _asked(job)]


def run_job(job: Job, file: ResultFile) -> int:
    """Compute the cells of a job that the file does not hold yet, each written at once.

    Returns:
        How many were computed now.
    """
    done = file.read()
    todo = [(cell, question) for cell, question in _asked(job) if cell not in done]
    if not todo:
        return 0
    trained = None if job.model is None else pretrain(job.settings, job.model, job.data)
    for task in {question.task.name: question.task for _, question in todo}.values():
        own = [(cell, question) for cell, question in todo if question.task == task]
        _answer(job, task, own, trained, file)
    return len(todo)


def _answer(
    job: Job,
    task: TaskConfig,
    questions: Sequence[tuple[Cell, _Question]],
    trained: Trained | None,
    file: ResultFile,
) -> None:
    """Answer all questions of one task; features are computed once for its probes."""
    scans, seed = job.data.scans.of(task), job.data.seed
    facts = {} if trained is None else trained.facts
    features: Features | None = None
    for cell, question in questions:
        if question.method != "finetune":
            features = features or extract(scans, _source(job, trained))
            outcome = run_probe(question.method, scans, task, features, seed=seed)
        elif trained is not None:
            outcome = finetune(
                scans,
                task,
                trained.weights,
                trained.config,
                job.settings.compare.finetune,
                fraction=question.fraction,
                seed=seed,
            ).outcome
        file.add(Result(cell, outcome, facts))


def _source(job: Job, trained: Trained | None) -> FeatureSource:
    if trained is None:
        shape = model_config(job.settings, Model(job.data.seed, "random"), list(job.data.sites))
        return PositionControl(shape) if job.control == "position" else IntensityControl(shape)
    return open_encoder(trained.weights, trained.config, network=judged_network(trained.config))


def _asked(job: Job) -> list[tuple[Cell, _Question]]:
    """Every question to a job's model, with the cell that its answer goes to."""
    model, compare = job.model, job.settings.compare
    if model is None:
        # A control has the grid of the encoders that it is compared with.
        shape = model_config(job.settings, Model(job.data.seed, "random"), list(job.data.sites))
        grid = f"{shape.agssd.model.patch_size}/{shape.anaus.augment.size}"
        stamp = digest_of(job.data.digest, job.control, grid)
        names = (job.control, "", "")
    else:
        config = model_config(job.settings, model, list(job.data.sites))
        stamp = stamp_of(config, job.data.digest)
        names = (model.arm, model.site, model.variant)
    found = []
    for task in compare.tasks:
        methods: tuple[Method, ...] = ("pixel",)
        if task.kind == "classification":
            methods = ("knn", "linear")
        asked = [_Question(task, method, 1.0) for method in methods]
        if model is not None and not model.variant:
            asked += [_Question(task, "finetune", fraction) for fraction in compare.fractions]
        for question in asked:
            how = dump_config(compare.finetune) if question.method == "finetune" else ""
            # Scans of these sites are asked nothing, which the split does not say.
            own = digest_of(stamp, dump_config(task), how, *sorted(compare.data.pretrain_only))
            cell = Cell(job.data.seed, *names, task.name, question.method, question.fraction, own)
            found.append((cell, question))
    return found
