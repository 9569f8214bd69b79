"""The verb ``agssd-sim lpsam-fit``."""

from pathlib import Path
from typing import Annotated

import typer

from agssd_core.config.load import load_config, parse_config
from agssd_core.console import progress_bar, say

DEFAULT_KEY = Path("~/.config/agssd/lpsam-signing.pem")


def lpsam_fit(
    pairs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders with X.png and X_mask.png, or CSV files image,mask.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Configuration with a section lpsam.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE laid over the configuration.")
    ] = None,
    key: Annotated[
        Path, typer.Option(help="Signing key, made on first use. Keep it to yourself.")
    ] = DEFAULT_KEY,
) -> None:
    """Fit LP-SAM on public images with masks, and sign it for the sites.

    Example: agssd-sim lpsam-fit public/tn3k --out lpsam-a.safetensors --set lpsam.regions=4
    """
    from simulation.lpsam import fit_file, fit_summary

    given = override or ()
    run = load_config(config, given) if config else parse_config({}, given)
    result = fit_file(pairs, out, run, key=key.expanduser(), bar=progress_bar)
    say(fit_summary(result, run.lpsam))
    for name, reason in sorted(result.skipped.items()):
        say(f"skipped {name}: {reason}")
    say(f"{out}, {out.name}.sig.json, {result.picture.name}: deliver the first two to the sites")
    say(f"SHA-256, to be told to the sites by another way: {result.digest}")
