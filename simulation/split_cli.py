"""The commands `agssd-sim datasets` and `agssd-sim split`."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from agssd_core.console import progress_bar, say
from agssd_core.errors import ConfigError
from simulation.datasets.rows import DatasetInfo

HEADS = ("name", "modality", "size", "licence", "site", "site verified", "where")


def datasets(
    names: Annotated[
        list[str] | None, typer.Argument(help="Whose layout to show.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """List the public data sets that can be divided, or show the layout that is expected.

    Example: agssd-sim datasets busi
    """
    from simulation.datasets.known import ADAPTERS

    infos = [adapter.info for adapter in ADAPTERS.values()]
    unknown = sorted(set(names or ()) - set(ADAPTERS))
    if unknown:
        raise ConfigError(f"there is no data set {unknown[0]!r}. Known: {', '.join(ADAPTERS)}.")
    chosen = [info for info in infos if not names or info.name in names]
    if as_json:
        say(json.dumps([asdict(info) for info in chosen], indent=1))
    elif names:
        say("\n\n".join(_described(info) for info in chosen))
    else:
        say(datasets_table(chosen))


def datasets_table(infos: list[DatasetInfo]) -> str:
    """The data sets as Markdown."""
    lines = [f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"]
    for info in infos:
        verified = "yes" if info.site_verified else "no"
        cells = (info.name, "/".join(info.modalities), info.size, info.licence, info.site, verified)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in (*cells, info.url))} |")
    return "\n".join(lines)


def _described(info: DatasetInfo) -> str:
    verified = "read in a published copy or loader" if info.layout_verified else "from memory"
    parts = [
        f"{info.name}: {info.title}",
        f"size: {info.size}",
        f"licence: {info.licence}",
        f"where: {info.url}",
        f"site: {info.site}",
        f"cite: {info.citation}",
        f"layout ({verified}):",
        *(f"  {line}" for line in info.layout),
        *(f"label {name}: {', '.join(classes)}" for name, classes in info.labels.items()),
        *(f"structure {value}: {name}" for value, name in info.structures.items()),
    ]
    return "\n".join(parts)


def split(  # noqa: PLR0913 - one parameter an option
    name: Annotated[str, typer.Argument(help="As `agssd-sim datasets` lists it.")],
    root: Annotated[Path, typer.Argument(help="Folder of the unpacked download.")],
    by: Annotated[
        str,
        typer.Option(
            help="site, vendor, modality, modality+vendor, fact:NAME, dirichlet:ALPHA[:LABEL] or "
            "quantity:ALPHA."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    sites: Annotated[
        int | None,
        typer.Option(help="How many; needed for dirichlet and quantity. Of others the largest."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    folds: Annotated[
        int, typer.Option(help="Patients are held out by folds; 0 holds out none.")
    ] = 5,
    fold: Annotated[int, typer.Option(help="Which one, from 0.")] = 0,
    downstream: Annotated[
        Path | None,
        typer.Option(help="Another split's folder, whose held-out patients must not train here."),
    ] = None,
    official: Annotated[
        bool,
        typer.Option(
            "--official/--no-official",
            help="Hold out the data set's own test patients, or divide them as any other.",
        ),
    ] = True,
) -> None:
    """Divide a public data set over simulated sites; no patient stands at two.

    Writes sites.csv, a picture of who has what, and a folder of raw scans for each site.

    Example: agssd-sim split busi /data/BUSI --by dirichlet:0.5 --sites 3 --out splits/busi
    """
    from simulation.split import PICTURE, SITES, Division, write_split

    division = Division(name, root.expanduser(), by, sites, seed, folds, fold, official)
    divided = write_split(division, out, downstream=downstream, bar=progress_bar)
    counts = Counter((item.site, item.split) for item in divided.placed)
    for site in sorted({item.site for item in divided.placed}):
        say(f"{site}: {counts[site, 'train']} scan(s) train, {counts[site, 'test']} held out")
    if divided.left_out:
        say(f"{divided.left_out} scan(s) belong to no site of this division and are left out")
    for reason, count in Counter(divided.unusable.values()).most_common():
        say(f"{count} scan(s) cannot train: {reason}")
    for note in divided.notes:
        say(f"note: {note}")
    say(f"table: {out / SITES}")
    say(f"picture: {out / PICTURE}")
    say(f"to train: agssd-sim run CONFIG simulation.split={out}")
