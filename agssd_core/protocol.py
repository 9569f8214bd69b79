"""What is said on the wire, as plain data. Arrays travel beside it under names of ``weights``."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

from agssd_core.errors import ProtocolError, ProtocolVersionError
from agssd_core.weights import Weights

PROTOCOL_VERSION = 3

Side = Literal["server", "site"]
HELD = "held"
"""An order's ``wire`` when nothing travels, because the site holds the very base."""


def version_problem(said: int, sender: Side) -> str:
    """Empty, or which side speaks which protocol and which of them to upgrade."""
    if said == PROTOCOL_VERSION:
        return ""
    other: Side = "site" if sender == "server" else "server"
    older = sender if said < PROTOCOL_VERSION else other
    return (
        f"the {sender} speaks protocol {said}, this {other} speaks {PROTOCOL_VERSION}. Upgrade "
        f"the {older}."
    )


def uplink_groups(teacher_rule: str) -> tuple[str, ...]:
    """Groups of arrays in an update: a teacher travels only where the server averages it (T1)."""
    teacher = ("teacher",) if teacher_rule == "average" else ()
    return ("student", *teacher, "state")


class Record:
    """Conversion to and from JSON with every field present and of its type."""

    sender: ClassVar[Side | None] = None

    def to_json(self) -> str:
        """As it travels."""
        return json.dumps(asdict(self), sort_keys=True)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a record.

        Raises:
            ProtocolError: not JSON, or a field is missing, surplus or of another type.
            ProtocolVersionError: it says that it is of another version of the protocol.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):  # a number of thousands of digits is a ValueError
            message = f"{cls.__name__} is not valid JSON. Use the same version on both sides."
            raise ProtocolError(message) from None
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """Read a record from a plain mapping (see ``from_json``)."""
        types: dict[str, Any] = {item.name: item.type for item in fields(cls)}  # type: ignore[arg-type]
        _require_version(content, cls.sender)
        if not isinstance(content, dict) or content.keys() != types.keys():
            raise ProtocolError(
                f"{cls.__name__} does not hold exactly the fields of protocol "
                f"{PROTOCOL_VERSION}. Use the same version on both sides."
            )
        for name, kind in types.items():
            if not _is_of(content[name], kind):
                raise ProtocolError(
                    f"{cls.__name__}.{name} is of type {type(content[name]).__name__}. "
                    "Use the same version on both sides."
                )
        return cls(**content)


def _require_version(content: Any, sender: Side | None) -> None:
    """Before the fields, which another version may have others of."""
    said = content.get("protocol") if isinstance(content, dict) else None
    if sender is None or not isinstance(said, int) or isinstance(said, bool):
        return
    if problem := version_problem(said, sender):
        raise ProtocolVersionError(problem)


def _is_of(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (str, bool):
        return isinstance(value, kind)
    if kind in (dict[str, str], dict[str, int]):
        inner = str if kind == dict[str, str] else int
        return isinstance(value, dict) and all(_is_of(each, inner) for each in value.values())
    return isinstance(value, dict)


@dataclass(frozen=True)
class RoundOrder(Record):
    """The server's order for one round at one site.

    Attributes:
        run: our own run id, stable across resumes; never Flower's run id.
        round: counted from 0; ``first_step`` = round * steps; ``total_steps`` = G of the plan.
        config: canonical JSON of the RunConfig that the site shall train with.
        base_digest: digest of the weights that the round starts from.
        nonce: random hex, echoed by the reply.
        site: enrolled name of the site that is ordered.
        wire: ``float32``, whole weights come along; ``bf16`` or ``int8``, their difference to the
            weights of ``previous_digest``; ``held``, nothing.
        schema_digest: of the round's weights.
        payload_digests, payload_sizes: SHA-256 and bytes of each part that comes along.
        journal: ``SEQUENCE:DIGEST``, the head of the sender's journal; the receiver notes it, so
            that neither can cut its journal short unnoticed. Empty without journals.
        ledger: newest head of the site's privacy ledger that the server holds (population,
            sequence, digest); empty when it holds none.
    """

    sender = "server"

    protocol: int
    run: str
    cohort: str
    round: int
    steps: int
    first_step: int
    total_steps: int
    config: str
    base_digest: str
    nonce: str
    site: str = ""
    wire: str = "float32"
    previous_digest: str = ""
    schema_digest: str = ""
    payload_digests: dict[str, str] = field(default_factory=dict)
    payload_sizes: dict[str, int] = field(default_factory=dict)
    journal: str = ""
    ledger: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteQuery(Record):
    """The server's question who a node is; ``nonce`` is random hex that the answer echoes."""

    sender = "server"

    protocol: int
    cohort: str
    nonce: str = ""


@dataclass(frozen=True)
class SiteHello(Record):
    """What a site says of itself when asked.

    Attributes:
        wires: forms of weights that it reads, separated by spaces.
        held: digest of the cohort's base that it keeps, empty when it keeps none.
        nonce: the question's.
    """

    sender = "site"

    protocol: int
    site: str
    cohort: str
    patient_count: int
    volume_count: int
    software: str
    wires: str = "float32"
    held: str = ""
    nonce: str = ""


@dataclass(frozen=True)
class UpdateHeader(Record):
    """The plain part of a site's update; ``metrics`` maps names to finite numbers.

    Attributes:
        weights_digest: of the arrays that the server has after decoding.
        wire: ``float32``, ``bf16`` or ``int8``; the latter are differences to the base.
        payload_digests, payload_sizes: SHA-256 and bytes of each part as it travels.
        journal: as in an order.
        privacy: a ``PrivacyStatement``'s fields; empty when trained without privacy.
    """

    sender = "site"

    protocol: int
    run: str
    cohort: str
    site: str
    round: int
    steps: int
    patient_count: int
    base_digest: str
    nonce: str
    schema_digest: str
    weights_digest: str
    metrics: dict[str, float]
    wire: str = "float32"
    payload_digests: dict[str, str] = field(default_factory=dict)
    payload_sizes: dict[str, int] = field(default_factory=dict)
    journal: str = ""
    privacy: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteUpdate:
    """An update: header and arrays (student, teacher unless it stays local, state)."""

    header: UpdateHeader
    weights: Weights = field(repr=False)


@dataclass(frozen=True)
class Refusal(Record):
    """A site's answer when it declines: a class of reason, nothing else."""

    sender = "site"

    protocol: int
    site: str
    run: str
    round: int
    nonce: str
    reason: str
