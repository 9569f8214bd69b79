"""Classes of reason that come from outside."""

import re

from agssd_core.errors import OversizeError, ProtocolVersionError

_CLASSES = ((OversizeError, "size"), (ProtocolVersionError, "protocol"))


def reason_of(error: Exception) -> str:
    """Class of reason of a reply that could not be read."""
    return next((why for kind, why in _CLASSES if isinstance(error, kind)), "malformed")


def plain_reason(text: str) -> str:
    """A class of reason from outside, fit for a log line and a file."""
    return text if re.fullmatch(r"[a-z0-9-]{1,40}", text) else "unknown"
