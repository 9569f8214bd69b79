"""What a site gets out of taking part: ``agssd-site fetch`` and ``finetune``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from agssd_core import finetune_cli as options
from agssd_core.console import progress_bar, say


def register(app: typer.Typer) -> None:
    """Add the verbs to ``agssd-site``."""
    for verb in (fetch, finetune):
        app.command()(verb)


def fetch(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Name or id of a run, or a file made by `agssd-server deliver`.",
            show_default=False,
        ),
    ],
    site: Annotated[Path, typer.Argument(help="The site's folder.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the checkpoint; left out, it is checked."),
    ] = None,
    cohort: Annotated[
        Literal["ct-mr", "us"] | None, typer.Option(help="Where both have that name.")
    ] = None,
) -> None:
    """Check the final checkpoint of a run against the coordinator's key, and write it to a folder.

    It comes by itself when the last round is over and the site is on line. A site that was away
    takes a file from the coordinator in place of RUN.

    Example: agssd-site fetch lung-2030 /srv/site --out encoder
    """
    from client.fetch import fetch_checkpoint

    found = fetch_checkpoint(what, site, out=out, cohort=cohort)
    said = found.certificate
    state = "final" if said.round == said.rounds else f"of {said.rounds}, not the last"
    say(
        f"{found.folder}: {said.name}, cohort {said.cohort}, round {said.round} ({state}); the "
        "coordinator's signature and all digests hold"
    )


def finetune(  # noqa: PLR0913 - a command's options
    encoder: Annotated[
        Path,
        typer.Argument(
            help="Folder that `fetch` wrote, or the site's own for its last round.",
            show_default=False,
        ),
    ],
    site: Annotated[Path, typer.Argument(help="The site's folder.", show_default=False)],
    table: Annotated[
        Path,
        typer.Argument(help="CSV of labels and label maps; docs/hospital.md.", show_default=False),
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
    """Fine-tune an encoder on the site's own labelled scans, and write a MONAI bundle.

    Nothing of it leaves the site. Patients that are held out are never learned from.

    Example: agssd-site finetune encoder /srv/site labels.csv --task-kind classification --label
    diagnosis --out tuned
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
    from client.finetuning import finetune_site

    report, left_out = finetune_site(encoder, site, table, out, request, bar=progress_bar)
    for line, reason in left_out.items():
        say(f"table: {line} left out: {reason}")
    options.say_report(report)
