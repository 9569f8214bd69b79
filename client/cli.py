"""``agssd-site``: what a hospital's computer runs."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from agssd_core.config.load import load_config, parse_config
from agssd_core.console import new_app, progress_bar, say
from agssd_core.data.catalogue import (
    Catalogue,
    ScanRecord,
    Skipped,
    VolumeRecord,
    database,
    open_catalogue,
    source_paths,
    true_path,
)
from agssd_core.data.grouping import Selection
from agssd_core.data.index import index_folders
from agssd_core.data.prepare import prepare_site
from agssd_core.errors import CatalogueError
from client import benefit_cli, keys_cli, ledger_cli
from client.delineate_cli import delineate
from client.policy import allowed_applications
from client.policy_cli import app as policy_app
from client.preflight_cli import preflight
from client.report_cli import report
from client.run import run_site
from client.supervise import run_enrolled

app = new_app("Index, prepare and train on the scans of one hospital. No scan leaves it.")

SiteArgument = Annotated[Path, typer.Argument(help="The site's folder.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON, for scripts.")]


@app.command()
def index(
    folders: Annotated[list[Path], typer.Argument(help="Folders to search.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The site's folder, made if new.")],
    modality: Annotated[
        Literal["CT", "MR"] | None,
        typer.Option(
            help="Modality of NIfTI files that do not say it. Images and videos are ultrasound, "
            "and DICOM says what it is."
        ),
    ] = None,
    only: Annotated[
        Literal["CT", "MR", "US"] | None, typer.Option(help="Take in this modality alone.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make or update the catalogue of a site from folders of scans.

    CT and MR are read from DICOM series and NIfTI files; ultrasound from DICOM files, images (PNG,
    JPEG, BMP, TIFF) and videos.

    Example: agssd-site index /pacs/export /research/nifti --out site
    """
    with progress_bar("Indexing") as advance:
        report = index_folders(
            out,
            folders,
            progress=advance,
            assume_modality=modality,
            selection=Selection(modalities=(only,) if only else ()),
        )
    if as_json:
        say(json.dumps(_public(asdict(report))))
        return
    held = _volumes_and_clips(report.volumes, report.clips)
    say(
        f"{held} of {report.patients} patient(s): {report.added} new or "
        f"changed, {report.unchanged} unchanged, {report.removed} gone, {report.left_out} not "
        f"wanted; {report.ignored} other file(s) ignored."
    )
    _list_skipped(report.skipped, site=out)


@app.command()
def prepare(
    site: SiteArgument,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Configuration of the run.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE laid over the configuration.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare checksums and redo damaged scans.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Fill the cache that training reads from. Scans that are ready are not done again.

    Example: agssd-site prepare site --config configs/simulation.yaml --workers 4
    """
    given = override or ()
    run = load_config(config, given) if config else parse_config({}, given)
    with progress_bar("Preparing") as advance:
        report = prepare_site(site, run.data, workers=workers, progress=advance, verify=verify)
    if as_json:
        say(json.dumps({**_public(asdict(report)), "ready": report.ready}))
        return
    say(
        f"{_volumes_and_clips(report.volumes, report.clips)} ready: {report.prepared} prepared "
        f"now, {report.unchanged} "
        f"before; {len(report.skipped)} skipped."
    )
    _list_skipped(report.skipped, site=site)
    if not report.ready:
        raise CatalogueError(
            "no volume is ready, and no ultrasound clip; at least one is needed for training. Mend "
            "what is listed above, or index other folders."
        )


app.command()(delineate)
app.add_typer(policy_app, name="policy")
app.command()(preflight)
app.command()(report)
keys_cli.register(app)


@app.command()
def skipped(
    site: SiteArgument,
    paths: Annotated[
        bool, typer.Option("--paths", help="Show the files' paths. They may name patients.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List what the catalogue left out, and why.

    Example: agssd-site skipped site --paths
    """
    catalogue = open_catalogue(site)
    items = [*catalogue.skipped, *_refusals(site, catalogue)]
    if as_json:
        rows = [asdict(item) for item in items]
        say(json.dumps(rows if paths else [_public(row) for row in rows]))
        return
    for item in items:
        say(f"{item.reference}  {item.reason}")
        for path in item.paths if paths else ():
            say(f"    {_printable(path)}")
    say(f"{len(items)} item(s) left out.")


@app.command()
def show(site: SiteArgument, as_json: JsonOption = False) -> None:
    """Show the volumes and ultrasound clips of a site under their pseudonyms.

    Example: agssd-site show site --json
    """
    catalogue = open_catalogue(site)
    if as_json:
        rows = [{**asdict(record), "modality": record.modality} for record in catalogue.scans]
        say(json.dumps(rows))
        return
    for record in catalogue.scans:
        say(
            f"{record.name}  patient {record.patient}  {record.modality}  {record.vendor}  "
            f"{_size(record)}"
        )
    held = _volumes_and_clips(len(catalogue.records), len(catalogue.clips))
    say(f"{held} of {catalogue.patient_count} patient(s).")


@app.command()
def run(
    site: SiteArgument,
    server: Annotated[
        str,
        typer.Option(
            "--server",
            help="127.0.0.1:PORT of a server on this machine, without certificates. Left out, the "
            "site connects to the coordinator that it is enrolled with.",
        ),
    ] = "",
    name: Annotated[str, typer.Option(help="With --server; the folder's name by default.")] = "",
) -> None:
    """Answer a server's orders until interrupted. Scans stay; weights and metrics go.

    Example: agssd-site run site
    """
    if server:
        run_site(site, server=server, name=name, say=say)
    else:
        run_enrolled(site, allowed=allowed_applications(site), say=say)


@app.command()
def export(
    place: Annotated[
        Path,
        typer.Argument(help="The site's folder, or a delivered checkpoint's.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    of_run: Annotated[str, typer.Option("--run", help="Which, when the site has several.")] = "",
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
    """Take an encoder out of the newest round here, or of a checkpoint that was delivered.

    Example: agssd-site export site --format monai-vit --out encoder.safetensors
    """
    from client.exporting import export_held

    number, chosen = export_held(place, out, run=of_run, cohort=cohort, network=network, form=form)
    say(f"{out}: {network} of round {number} as {chosen}")


ledger_cli.register(app)
benefit_cli.register(app)


def main() -> None:
    """Entry point of ``agssd-site``."""
    app()


def _refusals(site: Path, catalogue: Catalogue) -> list[Skipped]:
    """Scans of the catalogue, as they are now, that could not be prepared."""
    current = {(record.name, record.fingerprint) for record in catalogue.scans}
    with database(site, write=False) as table:
        return [
            Skipped(scan, reason, tuple(true_path(p) for p in source_paths(table, scan)))
            for (scan, _, fingerprint), reason in sorted(catalogue.refused.items())
            if (scan, fingerprint) in current
        ]


def _volumes_and_clips(volumes: int, clips: int) -> str:
    """``3 volume(s) and 12 clip(s)``, or the one kind that there is."""
    given = [f"{volumes} volume(s)"] if volumes or not clips else []
    return " and ".join([*given, f"{clips} clip(s)"] if clips else given)


def _size(record: ScanRecord) -> str:
    if isinstance(record, VolumeRecord):
        size = "x".join(str(side) for side in record.shape)
        spacing = "x".join(f"{side:.2f}" for side in record.spacing_mm)
        return f"{size} voxels of {spacing} mm"
    frames = f"{record.frames} frame(s)" if record.frames else "frames"
    return f"{frames} of {record.rows}x{record.columns} pixels"


def _printable(path: str) -> str:
    """A path on one line, with an escape for what a terminal cannot or should not print."""
    shown = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in shown)


def _list_skipped(items: Sequence[Skipped], *, site: Path) -> None:
    """One line for each reason; the single items stand in ``agssd-site skipped``."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for item in items:
        by_reason[item.reason].append(item.reference)
    for reason, references in by_reason.items():
        shown = ", ".join(references[:3]) + (", ..." if len(references) > 3 else "")
        say(f"skipped {len(references)} ({shown}): {reason}")
    if items:
        say(f"`agssd-site skipped {site} --paths` shows which files these are.")


def _public(row: dict[str, object]) -> dict[str, object]:
    """Drop the paths from what is printed."""
    inner = row.get("skipped")
    if isinstance(inner, (list, tuple)):
        return {**row, "skipped": [_public(item) for item in inner]}
    return {name: value for name, value in row.items() if name != "paths"}
