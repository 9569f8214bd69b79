"""The verb ``agssd-sim finetune``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from agssd_core.config.finetune import FinetuneConfig
from agssd_core.console import progress_bar, say
from agssd_core.errors import ConfigError

_DEFAULTS = FinetuneConfig()
Kind = Literal["segmentation", "classification"]


def finetune(  # noqa: PLR0913 - a command's options
    encoder: Annotated[
        Path, typer.Argument(help="Folder of a run; its newest round counts.", show_default=False)
    ],
    dataset: Annotated[
        Path, typer.Argument(help="Folder that `agssd-sim split` wrote.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")],
    kind: Annotated[Kind, typer.Option("--task-kind", help="What is learned.")] = "segmentation",
    label: Annotated[str, typer.Option(help="Of a classification: which label.")] = "",
    classes: Annotated[
        str, typer.Option(help="Of a classification: A,B,... in order; those found if left out.")
    ] = "",
    structures: Annotated[
        str,
        typer.Option(
            help="Of a segmentation: values of the masks, 1,2,...; all as one if left out."
        ),
    ] = "",
    fraction: Annotated[float, typer.Option(help="Share of the training patients.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of new layers, batches and the share.")] = 0,
    cohort: Annotated[
        Literal["ct-mr", "us"] | None,
        typer.Option(help="Whose encoder; may be left out where there is one."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = _DEFAULTS.steps,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of the training, such as learning_rate=1e-3."),
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Random weights, to compare with.")
    ] = False,
) -> None:
    """Fine-tune an encoder on a split, judge it on held-out patients, write a MONAI bundle.

    Example: agssd-sim finetune runs/demo splits/btcv --structures 1,6,7 --out tuned/btcv
    """
    from simulation.finetuning import Request, finetune_run

    request = Request(
        kind=kind,
        label=label,
        classes=tuple(name for name in classes.split(",") if name),
        structures=_numbers(structures),
        fraction=fraction,
        seed=seed,
        cohort=cohort,
        from_scratch=from_scratch,
        settings=_settings(steps, override or ()),
    )
    report = finetune_run(encoder, dataset, out, request, bar=progress_bar)
    for place, reasons in (("prepare", report.skipped), ("predict", report.failed)):
        for name, reason in sorted(reasons.items()):
            say(f"{place}: {name} left out: {reason}")
    for site, value in report.per_site.items():
        say(f"site {site}: {value:.4f}")
    say("held-out images: " + ", ".join(f"{n} {v:.4f}" for n, v in report.metrics.items()))
    say(f"bundle: {report.bundle}")
    say(f"report: {report.report}")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(
            f"--structures {text} are no whole numbers. Write the masks' values, such as 1,2,5."
        ) from None


def _settings(steps: int, overrides: "list[str] | tuple[()]") -> FinetuneConfig:
    given: dict[str, str | int] = {"steps": steps}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or name not in FinetuneConfig.model_fields:
            known = ", ".join(FinetuneConfig.model_fields)
            raise ConfigError(f"--set {text} sets nothing. Write KEY=VALUE with one of: {known}.")
        given[name] = value
    try:
        return FinetuneConfig.model_validate(given)
    except ValueError as error:
        raise ConfigError(_plain(error)) from None


def _plain(error: ValueError) -> str:
    """Pydantic's findings without its frame."""
    found: list[dict[str, Any]] = getattr(error, "errors", list)()
    lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}".strip(": ") for one in found]
    return "; ".join(line.replace("Value error, ", "") for line in lines) or str(error)
