"""A toy federation with keys, connections and journals on disk, as enrolment would leave them."""

from pathlib import Path

from typer.testing import CliRunner

from agssd_core.delivery import Certificate
from agssd_core.journal import Journal, entries_of
from client.app import make_app
from client.cli import app as site_app
from client.connection import Connection, keys_folder, save_connection
from client.identity import Identity
from client.site import Site
from client.site_journal import SiteJournal
from client.site_keys import make_keys
from server.chronicle import Chronicle
from server.keys import Keys
from tests.support.signing import SignedHospital


def fetch(*arguments):
    """The command of a site."""
    return CliRunner().invoke(site_app, ["fetch", *map(str, arguments)])


def certificate(number, weights="0" * 64):
    """Of a round of the toy run, unsigned."""
    return Certificate(2, "run-1", "run", "ct-mr", number, 5, "{}", weights, "0" * 64)


class EnrolledHospital(SignedHospital):
    """Every site is enrolled with the coordinator whose journal lies in ``folder/federation``."""

    def __init__(self, folder, **settings):
        super().__init__(folder, **settings)
        for name, site in self.sites.items():
            keys_folder(site).mkdir(mode=0o700)
            own = make_keys(site, 1)
            pinned = self.server_key.public
            save_connection(
                site, Connection("trial", name, "127.0.0.1:9", pinned.text(), 1, "2099-01-01")
            )
            self.identities[name] = Identity(own, pinned)
            (site / "policy.yaml").write_text("work: {least_images: 1}")
        found = {name: (each.signing_key.public,) for name, each in self.identities.items()}
        self.keys = Keys(self.server_key, found)
        self.federation = folder / "federation"
        self.federation.mkdir()

    def app(self):
        opened = {}

        def open_site(node_config):
            name, site = node_config["name"], Path(node_config["site"])
            if name not in opened:
                identity, journal = self.identities[name], SiteJournal.of(site)
                opened[name] = Site(site, name, self.bench, identity, journal)
            return opened[name]

        return make_app(open_site)

    def run(self, faults=None, grid=None, **kwargs):
        journal = Journal(self.federation, self.server_key, owner="trial")
        return super().run(faults, grid, chronicle=Chronicle(journal), **kwargs)

    def deliveries(self, name=None):
        """(site, event) of the coordinator's journal, or the events of a site's."""
        folder = self.federation if name is None else self.sites[name]
        found = [each.facts for each in entries_of(folder) if each.kind == "delivery"]
        return [(f["site"], f["event"]) if name is None else f["event"] for f in found]
