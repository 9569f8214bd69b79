"""Fine-tune a run's encoder on a split of a public data set, and hand it on as a MONAI bundle."""

from pathlib import Path

from agssd_core.console import Bar
from agssd_core.evaluation.finetuning import Encoder, Material, Report, Request, finetune_encoder
from simulation.datasets.known import ADAPTERS
from simulation.exporting import checkpoint_of
from simulation.labelled import row_sources
from simulation.split import read_split


def finetune_run(encoder: Path, split: Path, out: Path, request: Request, *, bar: Bar) -> Report:
    """Fine-tune on a split (see ``finetune_encoder``).

    Args:
        encoder: folder of a run; its newest round counts.
        split: folder that ``agssd-sim split`` wrote.
        out: folder to write to.
        request: what is to be learned.
        bar: makes a progress bar by its title.

    Raises:
        CheckpointError: the run holds no checkpoint of that cohort.
        DataError: the split is missing or damaged, or no scan answers the task.
        WeightsError: the checkpoint holds no encoder.
    """
    checkpoint, config = checkpoint_of(encoder, request.cohort)
    division, placed = read_split(split)
    adapter = ADAPTERS.get(division.name)
    info = None if adapter is None else adapter.info
    material = Material(
        name=division.name,
        title=division.name if info is None else info.title,
        licence="not recorded; ask its publisher" if info is None else info.licence,
        sources=row_sources(division.root, placed),
        structures={} if info is None else info.structures,
    )
    origin = f"round {checkpoint.round} of a federated run (cohort {config.federation.cohort})"
    taken = Encoder(checkpoint.weights, config, origin)
    return finetune_encoder(taken, material, out, request, bar=bar)
