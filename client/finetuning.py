"""Fine-tune a delivered encoder on the site's own labelled scans; everything stays at the site."""

from pathlib import Path

from agssd_core.console import Bar
from agssd_core.evaluation.finetuning import Encoder, Material, Report, Request, finetune_encoder
from client.exporting import held_encoder
from client.label_table import read_table

LICENCE = "the hospital's own scans; the hospital decides who may have the weights"


def finetune_site(
    encoder: Path, site: Path, table: Path, out: Path, request: Request, *, bar: Bar
) -> tuple[Report, dict[str, str]]:
    """Fine-tune on the scans of a table (see ``finetune_encoder``).

    Args:
        encoder: folder that ``agssd-site fetch`` wrote, or the site's, for its own last round.
        site: indexed folder whose scans the table speaks of.
        table: see ``client.label_table``.
        out: folder to write to, made for the owner alone.
        request: what is to be learned.
        bar: makes a progress bar by its title.

    Returns:
        What was written, and the lines of the table that could not be used.

    Raises:
        CheckpointError: the encoder is not there, or is damaged.
        DataError: the table cannot be used, or no scan answers the task.
    """
    held = held_encoder(encoder, cohort=request.cohort)
    found = read_table(table, site, seed=request.seed, label=request.label)
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    cohort = held.config.federation.cohort
    origin = f"round {held.round} of a federated run (cohort {cohort})"
    material = Material("site-scans", "scans of one hospital", LICENCE, found.scans)
    taken = Encoder(held.weights, held.config, origin)
    return finetune_encoder(taken, material, out, request, bar=bar), found.left_out
