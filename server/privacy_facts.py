"""What a run folder says of privacy, site by site; nothing in it is trusted to be well formed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agssd_core.errors import ProtocolError
from agssd_core.privacy_statement import PrivacyStatement
from server.central_accounts import CentralAccount, account_of
from server.cohorts import run_folders
from server.run_record import RunRecord, read_run
from server.statements import statements_of

DECLINED = "declined-budget"


@dataclass(frozen=True)
class SitePrivacy:
    """One site's part.

    Attributes:
        said: its newest statement; None when its updates came without one, or with none that can
            be read.
        rounds: of this run whose update was received.
    """

    name: str
    said: PrivacyStatement | None
    rounds: int

    @property
    def protects(self) -> bool:
        """Whether there is any guarantee at this site."""
        return self.said is not None and self.said.noise == "secure"


@dataclass(frozen=True)
class RunPrivacy:
    """One cohort of a run.

    Attributes:
        sites: every site from which an update was received.
        wanted: what the configuration asks of privacy; empty when it asks for none.
        metrics: names of the numbers that sites reported without noise.
        spent_out: sites that declined rounds because their budget was spent, and how many.
        central: what noised merges have cost whole sites; None where merges were not noised.
    """

    cohort: str
    rounds: int
    sites: tuple[SitePrivacy, ...]
    wanted: Mapping[str, Any]
    metrics: tuple[str, ...]
    spent_out: tuple[tuple[str, int], ...] = ()
    central: CentralAccount | None = None

    @property
    def stated(self) -> tuple[PrivacyStatement, ...]:
        """Statements of the sites that are protected."""
        return tuple(each.said for each in self.sites if each.said is not None and each.protects)

    @property
    def unprotected(self) -> tuple[str, ...]:
        """Sites without any guarantee."""
        return tuple(each.name for each in self.sites if not each.protects)

    @property
    def is_private(self) -> bool:
        """Whether every site is protected, of at least one."""
        return bool(self.sites) and not self.unprotected

    @property
    def is_simulated(self) -> bool:
        """Whether ledgers of single runs were asked."""
        return any(said.scope == "run" for said in self.stated)


def read_privacy(run_folder: Path) -> tuple[RunPrivacy, ...]:
    """Read every cohort of a run.

    Raises:
        CheckpointError: privacy.json or central-privacy.json of the run is damaged.
    """
    return tuple(_of(folder) for folder in run_folders(run_folder).values())


def shown_name(text: str) -> str:
    """A site's name, fit for a page and a table of Markdown."""
    return re.sub(r"[^A-Za-z0-9._-]", "?", text)[:64]


def _of(folder: Path) -> RunPrivacy:
    run = read_run(folder)
    statements = _held(run) | statements_of(folder)
    rounds = {site.name: len(site.rows) for site in run.sites if site.rows}
    names = sorted(statements.keys() | rounds)
    wanted = run.setting("privacy", {})
    asks = isinstance(wanted, Mapping) and wanted.get("enabled")
    extra = run.manifest.get("extra")
    return RunPrivacy(
        cohort=run.cohort,
        rounds=run.completed_rounds,
        sites=tuple(
            SitePrivacy(shown_name(name), _statement(statements.get(name)), rounds.get(name, 0))
            for name in names
        ),
        wanted=wanted if asks else {},
        metrics=_reported(run),
        spent_out=_spent_out(run),
        central=account_of(folder, extra if isinstance(extra, Mapping) else {}),
    )


def _reported(run: RunRecord) -> tuple[str, ...]:
    rows = (row for site in run.sites for row in site.rows)
    return tuple(sorted({name for row in rows for name in row.metrics}))


def _spent_out(run: RunRecord) -> tuple[tuple[str, int], ...]:
    counts = (
        (shown_name(site.name), sum(row.reason == DECLINED for row in site.refusals))
        for site in run.sites
    )
    return tuple((name, count) for name, count in counts if count)


def _held(run: RunRecord) -> dict[str, Any]:
    """What the newest checkpoint says, for a folder that was delivered without privacy.json."""
    extra = run.manifest.get("extra")
    told = extra.get("privacy") if isinstance(extra, Mapping) else None
    return dict(told) if isinstance(told, Mapping) else {}


def _statement(content: Any) -> PrivacyStatement | None:
    try:
        return PrivacyStatement.checked(content) if content else None
    except ProtocolError:
        return None
