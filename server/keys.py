"""The keys of a signed run: the coordinator's own, and those that its sites' replies must bear."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from agssd_core.signing import SigningKey, VerifyKey


@dataclass(frozen=True)
class Keys:
    """Without it a run is unsigned, for loopback; with it nothing unsigned is believed.

    Attributes:
        own: signs orders.
        sites: enrolled name -> keys valid now; two while a site renews its key. A mapping that
            looks them up when asked lets a revocation count from the next reply on.
    """

    own: SigningKey = field(repr=False)
    sites: Mapping[str, Collection[VerifyKey]] = field(repr=False)
