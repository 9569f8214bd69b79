"""Classes of reason that come from outside."""

import re


def plain_reason(text: str) -> str:
    """A class of reason from outside, fit for a log line and a file."""
    return text if re.fullmatch(r"[a-z0-9-]{1,40}", text) else "unknown"
