"""What a round starts from, and in which form each site gets it.

With ``federation.wire`` bf16 or int8 the merged weights are moved to what the coded difference
leads to, so that a site that decodes it and a site that gets them whole end on the same bits. The
difference and what coding left over lie in the checkpoint's state.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from agssd_core.differences import Payload, Wire, encode, pack_whole
from agssd_core.envelope import digests_of
from agssd_core.protocol import HELD
from agssd_core.weights import Weights
from server.manifest import Checkpoint
from server.merge import MergeResult

_RESIDUAL, _CODED = "residual/", "difference/"
EXTRA = "downlink"


@dataclass(frozen=True)
class Parcel:
    """Weights of an order on their way.

    Attributes:
        wire: as in ``RoundOrder``.
        previous_digest: of the base of a difference, otherwise empty.
    """

    wire: str
    previous_digest: str = ""
    payload: Payload = field(default_factory=dict, repr=False)

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each part, taken once for all orders."""
        return digests_of(self.payload)


@dataclass(frozen=True)
class NextBase:
    """What the next checkpoint holds: weights, state, and what its manifest adds."""

    weights: Weights = field(repr=False)
    state: Weights = field(repr=False)
    extra: dict[str, Any] = field(default_factory=dict)


class Downlink:
    """The forms of one round's base; each is made when the first site needs it."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base

    def parcel(self, held: str) -> Parcel:
        """The least that leads a site to the base.

        Args:
            held: digest of the base that the site holds; empty when that is not known.
        """
        if held and held == self._base.manifest.weights_digest:
            return Parcel(HELD)
        if held and held == self._said.get("previous"):
            return self._difference
        return self._whole

    @cached_property
    def _whole(self) -> Parcel:
        return Parcel("float32", payload=pack_whole(self._base.weights))

    @cached_property
    def _difference(self) -> Parcel:
        parts = {
            name.removeprefix(_CODED): part.tobytes()
            for name, part in self._base.state.items()
            if name.startswith(_CODED)
        }
        return Parcel(str(self._said.get("wire")), str(self._said.get("previous")), parts)

    @property
    def _said(self) -> Mapping[str, Any]:
        """What the checkpoint says of its difference; empty when it has none."""
        said = self._base.manifest.extra.get(EXTRA)
        return said if isinstance(said, Mapping) else {}


def rule_state(state: Weights) -> Weights:
    """The arrays of a checkpoint's state that belong to the merging rule."""
    return {n: a for n, a in state.items() if not n.startswith((_RESIDUAL, _CODED))}


def next_base(base: Checkpoint, result: MergeResult | None, *, wire: Wire) -> NextBase:
    """The weights that all sites shall start the next round from.

    Args:
        base: checkpoint that the round started from.
        result: of the merge; None leaves the weights, and nothing travels as a difference.
        wire: the plan's.

    Raises:
        WeightsError: the merged weights moved further than the form can say.
    """
    if result is None:
        kept = {n: a for n, a in base.state.items() if not n.startswith(_CODED)}
        return NextBase(base.weights, kept)
    if wire == "float32":
        return NextBase(result.weights, result.state.arrays)
    residual = {
        n.removeprefix(_RESIDUAL): a for n, a in base.state.items() if n.startswith(_RESIDUAL)
    }
    coded = encode(base.weights, result.weights, residual=residual, wire=wire)
    state = dict(result.state.arrays)
    state |= {_RESIDUAL + name: array for name, array in coded.residual.items()}
    state |= {_CODED + n: np.frombuffer(data, np.uint8) for n, data in coded.payload.items()}
    said = {"wire": wire, "previous": base.manifest.weights_digest}
    return NextBase(coded.reached, state, {EXTRA: said})
