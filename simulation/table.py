"""Runs in a few lines of Markdown: what each site reached, for documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agssd_core.config import config_from_json
from agssd_core.errors import CheckpointError
from server.cohorts import run_folders
from server.store import RunStore

COLUMNS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "ct-mr": (
        ("rec_ratio", "masked L1 / best constant"),
        ("information_cls", "I cls (nat)"),
        ("information_patch", "I patch (nat)"),
        ("effective_rank_share", "rank / at init"),
        ("drift", "drift"),
        ("drift_fused", "drift fused"),
    ),
    "us": (
        ("loss_align", "alignment (nat)"),
        ("loss_context", "core region"),
        ("same_anatomy_cosine", "same anatomy"),
        ("other_anatomy_cosine", "other anatomy"),
        ("anatomy_gap", "lead"),
        ("effective_rank_share", "rank / at init"),
        ("projection_std", "spread"),
    ),
}


@dataclass
class _Table:
    """One cohort's rows over all runs, and a closing line for each of them."""

    rows: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)


def run_table(folders: Sequence[Path]) -> str:
    """First and newest round of every site of these runs; a table for each cohort.

    Raises:
        CheckpointError: a folder holds no run, or one without a closed round.
    """
    tables: dict[str, _Table] = {}
    for folder in folders:
        found = [
            _add(tables, f"{folder.name}, cohort {name}" if name else folder.name, RunStore(own))
            for name, own in run_folders(folder).items()
        ]
        if not any(found):
            raise CheckpointError(
                "the folder holds no run with a closed round. Name one such as runs/demo."
            )
    return "\n\n".join(
        "\n".join([*_heads(cohort), *table.rows, "", *table.ends])
        for cohort, table in sorted(tables.items())
    )


def _heads(cohort: str) -> list[str]:
    heads = ["run", "seed", "site", "round", *(title for _, title in COLUMNS[cohort])]
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]


def _add(tables: dict[str, _Table], title: str, store: RunStore) -> bool:
    """Add one cohort of one run; False when it has closed no round."""
    rows = [row for row in store.metrics.rows() if row.get("kind") == "site"]
    newest = store.latest()
    if newest is None or not rows:
        return False
    config = config_from_json(newest.manifest.config)
    cohort = config.federation.cohort
    table = tables.setdefault(cohort, _Table())
    numbers = sorted({int(row["round"]) for row in rows})
    for row in (row for row in rows if row["round"] in (numbers[0], numbers[-1])):
        found = (row["metrics"].get(key) for key, _ in COLUMNS[cohort])
        values = ["-" if value is None else f"{value:.3f}" for value in found]
        first = [title.split(",")[0], str(config.seed), row["site"], str(row["round"] + 1)]
        table.rows.append(f"| {' | '.join([*first, *values])} |")
    table.ends.append(
        f"{title}: {newest.round} rounds, weights digest {newest.manifest.weights_digest[:16]}"
    )
    return True
