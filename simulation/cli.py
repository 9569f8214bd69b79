"""``agssd-sim``: a federation on one machine, and the tools of its researcher."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import typer

from agssd_core.config import load_config
from agssd_core.console import kept_interrupt, new_app, progress_bar, say, say_error
from agssd_core.errors import ConfigError, RoundError
from server.cohorts import run_folders
from server.outcome import RoundOutcome
from simulation.compare.cli import compare
from simulation.finetune_cli import finetune
from simulation.lpsam_cli import lpsam_fit
from simulation.split_cli import datasets, split

app = new_app("Run a federation of several sites on one machine, and take its encoders out.")

ConfigArgument = Annotated[
    Path, typer.Argument(help="YAML configuration of the run.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="KEY=VALUE, laid over the configuration.", show_default=False),
]


@app.command()
def run(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Make the sites, federate, and write runs/NAME/report.html. Run it again to go on.

    Example: agssd-sim run configs/simulation.yaml name=first federation.rounds=5
    """
    from simulation.run import run_simulation

    settings = load_config(config, overrides or ())
    merged: dict[str, list[bool]] = {}

    with kept_interrupt() as check_interrupt:

        def told(outcome: RoundOutcome) -> None:
            merged.setdefault(outcome.cohort, []).append(outcome.merged)
            _round_line(outcome)
            check_interrupt()

        report = run_simulation(settings, say=say, bar=progress_bar, on_round=told)
    say(f"report: {report}")
    failed = [name for name, rounds in merged.items() if not any(rounds)]
    for name, folder in run_folders(report.parent).items():
        if name not in failed and (name or not failed):
            say(f"merged checkpoint: {folder / 'checkpoints'}")
    if failed:
        raise RoundError(_no_quorum({name: len(merged[name]) for name in failed}))


@app.command()
def check(
    configs: Annotated[
        list[str],
        typer.Argument(help="YAML files, then KEY=VALUE overrides.", show_default=False),
    ],
) -> None:
    """Validate configurations without running them; every fault is reported at once.

    Example: agssd-sim check configs/simulation.yaml agssd.cvac.n_local=4
    """
    files = [text for text in configs if "=" not in text]
    overrides = [text for text in configs if "=" in text]
    if not files:
        raise ConfigError("no YAML file was named. Example: agssd-sim check configs/demo.yaml")
    faulty = 0
    for file in files:
        try:
            load_config(file, overrides)
        except ConfigError as error:
            faulty += 1
            say_error(error)
        else:
            say(f"{file}: valid")
    if faulty:
        raise typer.Exit(2)


@app.command()
def init(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Write the round-0 checkpoint that a coordinator's server starts from.

    Example: agssd-sim init configs/agssd-small.yaml name=consortium
    """
    from simulation.run import initialise

    folder, fresh = initialise(load_config(config, overrides or ()))
    say(f"{folder}: {'round 0 written' if fresh else 'the run has begun already; nothing changed'}")


@app.command()
def phantoms(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; a folder for each hospital.")],
    overrides: Overrides = None,
) -> None:
    """Write the raw scans of the invented hospitals, to try out what hospitals do with theirs.

    Example: agssd-sim phantoms configs/deploy-demo.yaml --out scans
    """
    from simulation.phantoms import write_phantom_site

    settings = load_config(config, overrides or ())
    if not settings.simulation.phantoms:
        raise ConfigError("simulation.phantoms is empty. Name a hospital to invent.")
    for site in settings.simulation.phantoms:
        count = write_phantom_site(out / site.name, site, seed=settings.seed)
        say(f"{out / site.name}: {count} scan(s)")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run's folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    round_index: Annotated[
        int | None, typer.Option("--round", help="Round of the checkpoint; the newest if left out.")
    ] = None,
    network: Annotated[Literal["teacher", "student"], typer.Option(help="Which.")] = "teacher",
    cohort: Annotated[
        Literal["ct-mr", "us"] | None,
        typer.Option(help="Whose encoder; may be left out where there is one."),
    ] = None,
    form: Annotated[
        Literal[
            "monai-vit", "monai-unetr", "monai-resnet", "torchvision-resnet", "fpn", "safetensors"
        ]
        | None,
        typer.Option(
            "--format",
            help="Names and shapes of the file's arrays; monai-vit for CT and MR, monai-resnet for "
            "ultrasound if left out.",
        ),
    ] = None,
) -> None:
    """Take an encoder out of a run, as a safetensors file in another library's names.

    Example: agssd-sim export runs/demo --format monai-vit --out encoder.safetensors
    """
    from simulation.exporting import export_run

    number, chosen = export_run(
        run, out, cohort=cohort, round_index=round_index, network=network, form=form
    )
    say(f"{out}: {network} of round {number} as {chosen}")


@app.command()
def report(
    config: ConfigArgument,
    overrides: Overrides = None,
) -> None:
    """Write the report of a run again, pictures included.

    Example: agssd-sim report configs/simulation.yaml
    """
    from simulation.run import rewrite_report

    say(f"report: {rewrite_report(load_config(config, overrides or ()))}")


@app.command()
def table(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", show_default=False)],
) -> None:
    """Print what each site reached in its first and newest round, as Markdown.

    Example: agssd-sim table runs/demo
    """
    from simulation.table import run_table

    say(run_table(runs))


app.command("lpsam-fit")(lpsam_fit)
app.command("datasets")(datasets)
app.command("split")(split)
app.command("compare")(compare)
app.command("finetune")(finetune)


def _no_quorum(rounds: Mapping[str, int]) -> str:
    """A run is no success of which a cohort learned nothing."""
    facts = [f"cohort {n}: none of {r} round(s) reached its quorum" for n, r in rounds.items()]
    return (
        f"{'; '.join(facts)}, at least one must, so the weights are those of the start. The report "
        "lists why updates were refused; mend that, or lower federation.min_sites, and start under "
        "another name."
    )


def _round_line(outcome: RoundOutcome) -> None:
    """One line for each round that closes."""
    shown = ("loss", "rec_ratio", "information_cls", "information_patch", "anatomy_gap")
    values = [
        f"{name} {fmean(found):.3f}"
        for name in shown
        if (found := [site[name] for site in outcome.metrics.values() if name in site])
    ]
    state = "merged" if outcome.merged else "quorum missed, weights unchanged"
    refused = "".join(f", {site} refused ({why})" for site, why in sorted(outcome.refusals.items()))
    say(
        f"{outcome.cohort} round {outcome.round + 1}/{outcome.rounds}: {state}, "
        f"{len(outcome.sites)} site(s){refused}, {outcome.seconds:.1f} s  {'  '.join(values)}"
    )


def main() -> None:
    """Entry point of ``agssd-sim``."""
    app()
