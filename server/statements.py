"""What sites said of the privacy of their updates: kept beside the checkpoints of a run.

The newest statement of every site whose update was received, merged or not: what has left a
hospital is spent. Its ledger's head goes back with the site's next order, so that a site whose
ledger was rolled back finds out.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agssd_core.errors import CheckpointError
from agssd_core.protocol import UpdateHeader
from agssd_core.weights import write_text
from server.central_accounts import told_of

STATEMENTS_FILE = "privacy.json"


def statements_of(run_folder: Path) -> dict[str, dict[str, Any]]:
    """Site -> its newest statement, empty for an update without privacy.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = run_folder / STATEMENTS_FILE
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {str(site): dict(said) for site, said in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise CheckpointError(
            "the run's privacy.json is damaged. Restore it from a copy of the run folder; the "
            "newest checkpoint's manifest holds the same under `privacy`."
        ) from None


def told(
    run_folder: Path,
    enrolled: Mapping[str, int],
    refusals: Mapping[str, str],
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """What a checkpoint's manifest says beside its shares.

    Args:
        run_folder: with what sites said of privacy, and what noised merges have cost.
        enrolled: site -> patients.
        refusals: site -> class of the reason why it is not in these weights.
        before: ``extra`` of the manifest before.
    """
    return {
        "enrolled": dict(sorted(enrolled.items())),
        "refusals": dict(sorted(refusals.items())),
        "privacy": statements_of(run_folder),
        **told_of(run_folder, before),
    }


def note_statement(run_folder: Path, header: UpdateHeader) -> None:
    """Remember what came with an admitted update.

    One update without a statement leaves its site without one for good: what it told stays told.
    A late statement never replaces a newer one; noise that could be repeated is not forgotten.
    """
    held = statements_of(run_folder)
    held[header.site] = _after(held.get(header.site), dict(header.privacy))
    write_text(run_folder / STATEMENTS_FILE, json.dumps(held, indent=1, sort_keys=True) + "\n")


def ledger_head(run_folder: Path, site: str) -> dict[str, Any]:
    """What goes back to a site with its order; empty when nothing is known of its ledger."""
    said = statements_of(run_folder).get(site, {})
    return {name: said[name] for name in ("population", "sequence", "digest") if name in said}


def _after(before: dict[str, Any] | None, said: dict[str, Any]) -> dict[str, Any]:
    if before is None:
        return said
    if not before or not said:
        return {}
    newest = max(before, said, key=lambda each: int(each["sequence"]))
    repeatable = "repeatable" in (before["noise"], said["noise"])
    return {**newest, "noise": "repeatable"} if repeatable else newest
