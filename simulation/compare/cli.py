"""The command `agssd-sim compare`."""

from pathlib import Path
from typing import Annotated

import typer

from agssd_core.config import load_config
from agssd_core.console import progress_bar, say
from agssd_core.errors import ConfigError


def compare(
    config: Annotated[
        Path, typer.Argument(help="YAML configuration with `compare`.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="KEY=VALUE, laid over the configuration.", show_default=False),
    ] = None,
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="Switch parts of the method and rules of merging off or over, one at a time, in "
            "place of comparing arms.",
        ),
    ] = False,
    privacy: Annotated[
        bool,
        typer.Option(
            "--privacy",
            help="What differential privacy costs: no privacy and epsilon 8, 3, 1, from nothing "
            "and from init.checkpoint, in place of comparing arms.",
        ),
    ] = False,
) -> None:
    """Pre-train federated, pooled, alone and not at all, and judge the encoders on held-out scans.

    Every model takes the same number of optimiser steps. Writes runs/NAME/comparison.md and .png
    (or ablation.md, privacy.md) and results.jsonl. Run it again to go on: cells that are done are
    kept.

    Example: agssd-sim compare configs/compare-phantoms.yaml name=first
    """
    from simulation.compare.run import Form
    from simulation.compare.run import compare as run_comparison

    if ablate and privacy:
        raise ConfigError("--ablate and --privacy are two comparisons. Name one at a time.")
    settings = load_config(config, overrides or ())
    form: Form = "privacy" if privacy else "ablation" if ablate else "comparison"
    table = run_comparison(settings, form=form, say=say, bar=progress_bar)
    say(table.read_text(encoding="utf-8"))
    say(f"table: {table}")
    say(f"figure: {table.with_suffix('.png')}")
    say(f"raw numbers: {table.parent / 'results.jsonl'}")
