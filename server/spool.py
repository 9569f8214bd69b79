"""Admitted updates of one round on disk, so that memory never holds a cohort of models.

Per site ``<key>.safetensors`` and ``<key>.json``; the second is written last and makes the
entry count, so a killed server finds whole updates or none. Keys are digests of site names:
a name from outside never becomes a path.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agssd_core.errors import AgssdError, ProtocolError, RoundError
from agssd_core.protocol import SiteUpdate, UpdateHeader
from agssd_core.weights import Array, file_digest, load_weights, save_weights, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpooledUpdate:
    """What is kept beside the arrays: the header, and the server's own notes (bytes, seconds)."""

    header: UpdateHeader
    note: dict[str, float]
    path: Path


class RoundSpool:
    """A folder of admitted updates. Opening it again finds what a killed server had admitted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, SpooledUpdate] = {}
        for record in sorted(folder.glob("*.json")):
            self._reopen(record)

    def add(self, update: SiteUpdate, *, note: Mapping[str, float] | None = None) -> None:
        """Keep an admitted update.

        Raises:
            RoundError: the site's update is already here, or the disk is full.
        """
        site = update.header.site
        if site in self._entries:
            raise RoundError("the site's update is already spooled. Admit updates before adding.")
        path = self.folder / f"{_key(site)}.safetensors"
        notes = dict(note or {})
        try:
            save_weights(path, update.weights)
            record = {
                "header": update.header.to_json(),
                "note": notes,
                "sha256": file_digest(path),
            }
            write_text(path.with_suffix(".json"), json.dumps(record, sort_keys=True))
        except (OSError, AgssdError) as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            raise RoundError(
                f"an update could not be spooled ({type(error).__name__}). Free disk space in the "
                "run's folder and resume; updates already spooled are kept."
            ) from None
        self._entries[site] = SpooledUpdate(update.header, notes, path)

    def sites(self) -> tuple[str, ...]:
        """Sites whose updates are here, sorted."""
        return tuple(sorted(self._entries))

    def header(self, site: str) -> UpdateHeader:
        """The header that came with a site's update."""
        return self._entries[site].header

    def note(self, site: str) -> dict[str, float]:
        """What the server noted when it added the update."""
        return dict(self._entries[site].note)

    def read(self, site: str, name: str) -> Array:
        """One array of one site.

        The file is opened for each array: a mapping kept open would count every page read
        towards the server's memory.

        Raises:
            WeightsError: the file is damaged or lacks the array.
        """
        return load_weights(self._entries[site].path, names=[name])[name]

    def keep_only(self, *, run: str, round_index: int, base_digest: str) -> None:
        """Drop updates of another run, round or base; for a server that resumes."""
        wanted = (run, round_index, base_digest)
        for site, entry in list(self._entries.items()):
            header = entry.header
            if (header.run, header.round, header.base_digest) != wanted:
                self._drop(entry.path)
                del self._entries[site]

    def clear(self) -> None:
        """Forget every update."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._entries.clear()

    def _reopen(self, record: Path) -> None:
        path = record.with_suffix(".safetensors")
        try:
            content: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            header = UpdateHeader.from_json(content["header"])
            if file_digest(path) != content["sha256"]:
                raise ProtocolError("the arrays are not those that were admitted.")
            self._entries[header.site] = SpooledUpdate(header, dict(content["note"]), path)
        except (OSError, ValueError, KeyError, TypeError, ProtocolError):
            log.warning("a spooled update is damaged and was dropped; its site is asked again")
            self._drop(path)

    @staticmethod
    def _drop(path: Path) -> None:
        for file in (path.with_suffix(".json"), path):
            with suppress(OSError):
                file.unlink(missing_ok=True)


def _key(site: str) -> str:
    return hashlib.sha256(site.encode("utf-8", "surrogatepass")).hexdigest()[:32]
