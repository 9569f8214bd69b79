"""The verb ``agssd-sim finetune``."""

from pathlib import Path
from typing import Annotated

import typer

from agssd_core import finetune_cli as options
from agssd_core.console import progress_bar


def finetune(  # noqa: PLR0913 - a command's options
    encoder: Annotated[
        Path, typer.Argument(help="Folder of a run; its newest round counts.", show_default=False)
    ],
    dataset: Annotated[
        Path, typer.Argument(help="Folder that `agssd-sim split` wrote.", show_default=False)
    ],
    out: options.OutOption,
    kind: options.KindOption = "segmentation",
    label: options.LabelOption = "",
    classes: options.ClassesOption = "",
    structures: options.StructuresOption = "",
    fraction: options.FractionOption = 1.0,
    seed: options.SeedOption = 0,
    cohort: options.CohortOption = None,
    steps: options.StepsOption = options.DEFAULT_STEPS,
    override: options.SetOption = None,
    from_scratch: options.ScratchOption = False,
) -> None:
    """Fine-tune an encoder on a split, judge it on held-out patients, write a MONAI bundle.

    Example: agssd-sim finetune runs/demo splits/btcv --structures 1,6,7 --out tuned/btcv
    """
    request = options.request_of(
        kind,
        label=label,
        classes=classes,
        structures=structures,
        fraction=fraction,
        seed=seed,
        cohort=cohort,
        from_scratch=from_scratch,
        steps=steps,
        override=override,
    )
    from simulation.finetuning import finetune_run

    options.say_report(finetune_run(encoder, dataset, out, request, bar=progress_bar))
