"""A federation's folder and sites that enrol in it."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from agssd_core.config.deployment import DeploymentConfig
from agssd_core.data.index import index_folders
from client.connection import keys_folder
from client.enrol import REQUEST_FILE, accept_answer, enrol
from server.admit import admit
from server.provision import provision
from tests.support.sites import make_raw_site

NOW = datetime(2030, 5, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
SECRET = b"a passphrase of a test"


def settings(*sites, name="lungs", cohorts=("ct-mr",), **changes):
    return DeploymentConfig.model_validate(
        {
            "name": name,
            "server": {"host": "fed.example.org", "port": 8443, "names": ["10.20.0.5"]},
            "sites": [{"name": site, "cohorts": cohorts} for site in sites or ("north", "south")],
            **changes,
        }
    )


def provisioned(folder: Path, *sites, now=NOW, **changes) -> Path:
    provision(settings(*sites, **changes), folder, passphrase=lambda _new: SECRET, now=now)
    return folder


def raw_site(folder: Path, patients=2, modality="CT", seed=0) -> Path:
    """A site with a catalogue and nothing prepared."""
    raw = make_raw_site(folder.with_name(f"{folder.name}-raw"), modality, patients, seed)
    index_folders(folder, [raw])
    return folder


def kit_of(federation: Path, site: str) -> Path:
    return federation / "kits" / f"{site}.zip"


def request_of(site: Path) -> Path:
    return keys_folder(site) / REQUEST_FILE


def enrolled(site: Path, federation: Path, *, name="north", now=NOW):
    """The whole way of a first key; returns the enrolment."""
    enrol(site, kit_of(federation, name), now=now)
    enrolment, answer = admit(request_of(site), federation, now=now)
    accept_answer(site, answer, now=now)
    return enrolment


def written(path: Path, record) -> Path:
    path.write_text(record.to_json())
    return path


def events(folder: Path):
    """What a journal tells, without looking at its chain."""
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [json.loads(line)["facts"].get("event") for line in lines]
