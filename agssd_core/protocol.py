"""What is said on the wire, as plain data. Arrays travel beside it under names of ``weights``."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from agssd_core.errors import ProtocolError
from agssd_core.weights import Weights

PROTOCOL_VERSION = 1


def uplink_groups(teacher_rule: str) -> tuple[str, ...]:
    """Groups of arrays in an update: a teacher travels only where the server averages it (T1)."""
    teacher = ("teacher",) if teacher_rule == "average" else ()
    return ("student", *teacher, "state")


class Record:
    """Conversion to and from JSON with every field present and of its type."""

    def to_json(self) -> str:
        """One line of JSON with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a record.

        Raises:
            ProtocolError: not JSON, or a field is missing, surplus or of another type.
        """
        try:
            content = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            message = f"{cls.__name__} is not valid JSON. Use the same version on both sides."
            raise ProtocolError(message) from None
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """Read a record from a plain mapping (see ``from_json``)."""
        types: dict[str, Any] = {item.name: item.type for item in fields(cls)}  # type: ignore[arg-type]
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


def _is_of(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (str, bool):
        return isinstance(value, kind)
    return isinstance(value, dict)


@dataclass(frozen=True)
class RoundOrder(Record):
    """The server's order for one round at one site.

    Attributes:
        run: our own run id, stable across resumes; never Flower's run id.
        round: counted from 0; ``first_step`` = round * steps; ``total_steps`` = G of the plan.
        config: canonical JSON of the RunConfig that the site shall train with.
        base_digest: digest of the weights that come with the order.
        nonce: random hex, echoed by the reply.
    """

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


@dataclass(frozen=True)
class SiteQuery(Record):
    """The server's question who a node is."""

    protocol: int
    cohort: str


@dataclass(frozen=True)
class SiteHello(Record):
    """What a site says of itself when asked."""

    protocol: int
    site: str
    cohort: str
    patient_count: int
    volume_count: int
    software: str


@dataclass(frozen=True)
class UpdateHeader(Record):
    """The plain part of a site's update; ``metrics`` maps names to finite numbers."""

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


@dataclass(frozen=True)
class SiteUpdate:
    """An update: header and arrays (student, teacher unless it stays local, state)."""

    header: UpdateHeader
    weights: Weights = field(repr=False)


@dataclass(frozen=True)
class Refusal(Record):
    """A site's answer when it declines: a class of reason, nothing else."""

    protocol: int
    site: str
    run: str
    round: int
    nonce: str
    reason: str
