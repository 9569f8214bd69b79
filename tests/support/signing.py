"""A toy federation whose orders and replies are signed."""

from agssd_core.signing import SigningKey
from client.identity import Identity
from server.keys import Keys
from tests.support.toy import Hospital


class SignedHospital(Hospital):
    """Every site has its key and the coordinator's; ``keys`` is what the server goes by."""

    def __init__(self, folder, *args, **kwargs):
        super().__init__(folder, *args, **kwargs)
        self.server_key = SigningKey.create()
        self.identities = {
            name: Identity(SigningKey.create(), self.server_key.public) for name in self.sites
        }
        self.keys = Keys(
            self.server_key,
            {name: (each.signing_key.public,) for name, each in self.identities.items()},
        )

    def run(self, faults=None, grid=None, **kwargs):
        return super().run(faults, grid, keys=self.keys, **kwargs)
