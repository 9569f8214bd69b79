"""Options of ``agssd-sim finetune`` and ``agssd-site finetune``, and what both print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agssd_core.config import Cohort
from agssd_core.config.finetune import FinetuneConfig
from agssd_core.console import say
from agssd_core.errors import ConfigError

if TYPE_CHECKING:  # torch is loaded when the work begins
    from agssd_core.evaluation.finetuning import Report, Request

Kind = Literal["segmentation", "classification"]
DEFAULT_STEPS = FinetuneConfig().steps

OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")]
KindOption = Annotated[Kind, typer.Option("--task-kind", help="What is learned.")]
LabelOption = Annotated[str, typer.Option(help="Of a classification: which label.")]
ClassesOption = Annotated[
    str, typer.Option(help="Of a classification: A,B,... in order; those found if left out.")
]
StructuresOption = Annotated[
    str,
    typer.Option(help="Of a segmentation: values of the masks, 1,2,...; all as one if left out."),
]
FractionOption = Annotated[float, typer.Option(help="Share of the training patients.")]
SeedOption = Annotated[int, typer.Option(help="Of new layers, batches and the share.")]
CohortOption = Annotated[
    Cohort | None, typer.Option(help="Whose encoder; may be left out where there is one.")
]
StepsOption = Annotated[int, typer.Option(help="Optimiser steps.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE of the training, such as learning_rate=1e-3."),
]
ScratchOption = Annotated[
    bool, typer.Option("--from-scratch", help="Random weights, to compare with.")
]


def request_of(
    kind: Kind,
    *,
    classes: str,
    structures: str,
    steps: int,
    override: list[str] | None,
    **more: Any,
) -> "Request":
    """What is to be learned, from a command's options.

    Args:
        kind: of the task.
        classes: separated by commas.
        structures: numbers separated by commas.
        steps: optimiser steps.
        override: KEY=VALUE of the training.
        more: the other fields of a ``Request``.

    Raises:
        ConfigError: an option is no number, or names no setting.
    """
    from agssd_core.evaluation.finetuning import Request

    return Request(
        kind=kind,
        classes=tuple(name for name in classes.split(",") if name),
        structures=_numbers(structures),
        settings=_settings(steps, override or []),
        **more,
    )


def say_report(report: "Report") -> None:
    """What was left out, the numbers, and where everything lies."""
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


def _settings(steps: int, overrides: list[str]) -> FinetuneConfig:
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
