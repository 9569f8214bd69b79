"""A run's final checkpoint on its way to the sites: what the coordinator signs, what a site says.

The certificate is the same for every site and stays with the weights, so that whoever holds both
can check them again, with or without a connection. The final order brings it to one site.
"""

from dataclasses import dataclass, field
from typing import Any

from agssd_core.protocol import Record


@dataclass(frozen=True)
class Certificate(Record):
    """The coordinator's word for a checkpoint; signed with purpose ``checkpoint``.

    Attributes:
        run: our own run id. name: what the coordinator calls the run.
        round: the checkpoint's, that is, how many rounds it holds; ``rounds`` is the plan's.
        config: canonical JSON of the RunConfig that sites trained with.
        weights_digest, schema_digest: of the arrays.
    """

    sender = "server"

    protocol: int
    run: str
    name: str
    cohort: str
    round: int
    rounds: int
    config: str
    weights_digest: str
    schema_digest: str


@dataclass(frozen=True)
class FinalOrder(Record):
    """A final checkpoint for one site; ``run`` to ``weights_digest`` are the certificate's own.

    Attributes:
        site, nonce, wire, previous_digest, payload_digests, payload_sizes, journal: as in a
            ``RoundOrder``.
        certificate: a ``Certificate``'s fields; ``certificate_signature`` is that over them.
    """

    sender = "server"

    protocol: int
    run: str
    cohort: str
    round: int
    weights_digest: str
    nonce: str
    site: str
    certificate: dict[str, Any]
    certificate_signature: str
    wire: str = "float32"
    previous_digest: str = ""
    payload_digests: dict[str, str] = field(default_factory=dict)
    payload_sizes: dict[str, int] = field(default_factory=dict)
    journal: str = ""


@dataclass(frozen=True)
class FinalReceipt(Record):
    """A site's answer: it holds these very weights."""

    sender = "site"

    protocol: int
    site: str
    run: str
    cohort: str
    round: int
    nonce: str
    weights_digest: str
