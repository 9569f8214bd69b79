"""All cells of a comparison, side by side, each computed once."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal

import torch

from agssd_core.config import RunConfig
from agssd_core.console import Bar
from agssd_core.errors import ConfigError, EngineError
from agssd_core.processes import die_with_parent
from agssd_core.weights import write_text
from server.start import with_start
from simulation.compare.data import SeedData, prepare_seed, scans_of
from simulation.compare.figure import draw_comparison
from simulation.compare.judge import CONTROLS, Job, cells_of, run_job
from simulation.compare.plan import (
    Model,
    ablated_models,
    cohort_of,
    models_of,
    private_models,
)
from simulation.compare.private_figure import draw_privacy
from simulation.compare.private_table import privacy_table
from simulation.compare.results import Cell, Result, ResultFile
from simulation.compare.summary import comparison_table
from simulation.run import run_folder
from simulation.sites import Say

RESULTS = "results.jsonl"

Form = Literal["comparison", "ablation", "privacy"]


def compare(settings: RunConfig, *, form: Form = "comparison", say: Say, bar: Bar) -> Path:
    """Run what is missing of a comparison, then write its table and figure.

    Args:
        settings: with ``compare`` and one cohort.
        form: ``comparison`` of the arms; ``ablation``, the federated arm with every switch of its
            method and merging; ``privacy``, the federated arm at every level of privacy, from
            nothing and from ``init.checkpoint``.
        say: writes a line.
        bar: opens a progress bar.

    Returns:
        Path of the table, Markdown; the figure lies beside it.

    Raises:
        ConfigError: no task, or the configuration does not fit the data.
        CheckpointError: ``init.checkpoint`` cannot be used.
        EngineError: a process ended; finished cells are kept and not computed again.
    """
    if not settings.compare.tasks:
        raise ConfigError("compare.tasks is empty, nothing would be compared. Name a task.")
    cohort_of(settings)
    if settings.compare.variants and form != "ablation":
        raise ConfigError("compare.variants are those of --ablate. Add it, or leave them out.")
    settings = with_start(settings)
    if form != "comparison":  # what cannot be trained is said before anything is prepared
        _models(settings, (), form, seed=0)
    folder = run_folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    scans = scans_of(settings, folder, bar=bar)
    seeds = [
        prepare_seed(settings, folder, scans, place=place, say=say, bar=bar)
        for place in range(len(settings.compare.seeds))
    ]
    jobs = [job for data in seeds for job in _jobs(settings, data, form)]
    cells = [cell for job in jobs for cell in cells_of(job)]
    file = ResultFile(folder / RESULTS)
    done = file.read()
    missing = sum(cell not in done for cell in cells)
    say(f"{len(cells)} cells, {len(cells) - missing} done before")
    _run_all(jobs, file, workers=settings.compare.workers, say=say, bar=bar)
    return _write(folder, settings, cells, file.read(), form=form)


def _models(settings: RunConfig, sites: Sequence[str], form: Form, *, seed: int) -> Sequence[Model]:
    if form == "ablation":
        return ablated_models(settings, seed=seed)
    if form == "privacy":
        return private_models(settings, seed=seed)
    return models_of(settings, sites, seed=seed)


def _jobs(settings: RunConfig, data: SeedData, form: Form) -> list[Job]:
    models = _models(settings, list(data.sites), form, seed=data.seed)
    found = [Job(settings, data, model) for model in models]
    return found + [Job(settings, data, control=control) for control in CONTROLS]


def _run_all(jobs: Sequence[Job], file: ResultFile, *, workers: int, say: Say, bar: Bar) -> None:
    done = file.read()
    todo = [job for job in jobs if any(cell not in done for cell in cells_of(job))]
    if not todo:
        return
    # A fresh interpreter: threads and Flower's own state do not survive a fork.
    pool = ProcessPoolExecutor(
        max_workers=min(workers, len(todo)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_worker,
        initargs=(os.getpid(),),
    )
    try:
        with bar("Comparing") as advance:
            running = {pool.submit(_work, job, file): job for job in todo}
            _collect(running, total=len(todo), say=say, advance=advance)
    except BrokenProcessPool:
        raise EngineError(
            "a process of the comparison was ended, perhaps for want of memory. Finished cells are "
            "kept: run the same command again, with fewer compare.workers."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.terminate()


def _collect(
    running: dict["Future[int]", Job],
    *,
    total: int,
    say: Say,
    advance: Callable[[int, int], None],
) -> None:
    finished = 0
    while running:
        ended, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in ended:
            job = running.pop(future)
            count = future.result()
            finished += 1
            name = job.control if job.model is None else job.model.name
            say(f"seed {job.data.seed}, {name}: {count} cell(s)")
            advance(finished, total)


def _begin_worker(parent: int) -> None:
    die_with_parent()
    if os.getppid() != parent:  # it was gone before we could ask
        raise SystemExit


def _work(job: Job, file: ResultFile) -> int:
    torch.set_num_threads(job.settings.threads)
    return run_job(job, file)


def _write(
    folder: Path,
    settings: RunConfig,
    cells: Sequence[Cell],
    done: dict[Cell, Result],
    *,
    form: Form,
) -> Path:
    results = [done[cell] for cell in cells if cell in done]
    table = folder / f"{form}.md"
    if form == "privacy":
        write_text(table, privacy_table(results, settings))
        draw_privacy(table.with_suffix(".png"), results, settings)
        return table
    write_text(table, comparison_table(results, settings))
    draw_comparison(table.with_suffix(".png"), results, settings)
    return table
