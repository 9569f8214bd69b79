"""A run in a few lines of Markdown: what each site reached, for documents."""

from collections.abc import Sequence
from pathlib import Path

from agssd_core.config import config_from_json
from agssd_core.errors import CheckpointError
from server.store import RunStore

COLUMNS = (
    ("rec_ratio", "masked L1 / best constant"),
    ("information_cls", "I cls (nat)"),
    ("information_patch", "I patch (nat)"),
    ("effective_rank_share", "rank / at init"),
    ("drift", "drift"),
    ("drift_fused", "drift fused"),
)


def run_table(folders: Sequence[Path]) -> str:
    """First and newest round of every site of these runs.

    Raises:
        CheckpointError: a folder holds no run, or one without a closed round.
    """
    heads = ["run", "seed", "site", "round", *(title for _, title in COLUMNS)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    ends = []
    for folder in folders:
        store = RunStore(folder)
        rows = [row for row in store.metrics.rows() if row.get("kind") == "site"]
        newest = store.latest()
        if newest is None or not rows:
            raise CheckpointError(
                "the folder holds no run with a closed round. Name one such as runs/demo."
            )
        seed = _seed(newest.manifest.config)
        numbers = sorted({int(row["round"]) for row in rows})
        for row in (row for row in rows if row["round"] in (numbers[0], numbers[-1])):
            values = [f"{row['metrics'].get(name, float('nan')):.3f}" for name, _ in COLUMNS]
            first = [folder.name, seed, row["site"], str(row["round"] + 1)]
            lines.append(f"| {' | '.join([*first, *values])} |")
        ends.append(
            f"{folder.name}: {newest.round} rounds, weights digest "
            f"{newest.manifest.weights_digest[:16]}"
        )
    return "\n".join([*lines, "", *ends])


def _seed(config: str) -> str:
    return str(config_from_json(config).seed)
