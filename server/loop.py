"""What all rounds of a run share."""

from collections.abc import Callable
from dataclasses import dataclass, field

from agssd_core.config import RunConfig
from server.chronicle import Chronicle
from server.collect import Exchange, Puller
from server.discovery import SiteBook
from server.keys import Keys
from server.live import LiveBoard
from server.store import RunStore


@dataclass(frozen=True)
class LateOrder:
    """An order whose deadline is over; its reply may still come.

    Attributes:
        expires: on the clock; Flower forgets the message then.
    """

    site: str
    round: int
    nonce: str
    expires: float


@dataclass
class RoundLoop:
    """Grid, store and time of a run, and the orders whose deadline is over.

    Attributes:
        keys: None for an unsigned run; otherwise orders are signed, and unsigned replies refused.
    """

    config: RunConfig
    store: RunStore
    grid: Exchange
    puller: Puller
    book: SiteBook
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    board: LiveBoard
    late: dict[str, LateOrder] = field(default_factory=dict)
    keys: Keys | None = None
    chronicle: Chronicle | None = None
