"""A reply's envelope: checked whole before any of its arrays is decoded."""

from agssd_core.differences import decode, unpack_whole
from agssd_core.envelope import SealedRefusal, SealedUpdate, require_payload, verify
from agssd_core.errors import PayloadError, SignatureError, UpdateRejectedError
from agssd_core.protocol import SiteUpdate, UpdateHeader
from agssd_core.weights import schema_digest
from server.admission import REASONS, AdmissionRules, rejected, require_asked, require_order


def open_update(sealed: SealedUpdate, rules: AdmissionRules, *, asked: str) -> SiteUpdate:
    """The update with its arrays decoded to weights; ``admit`` then looks at those.

    Args:
        sealed: as it came; nothing about it is trusted.
        rules: the round's.
        asked: site whose order the reply answers.

    Raises:
        UpdateRejectedError: with ``reason`` one of ``REASONS``.
        WeightsError: the arrays do not fit the base, though they are those declared.
    """
    header = sealed.header
    _require_site(header, rules, asked=asked)
    _require_signature(sealed, rules)
    schema = rules.schema()
    if header.schema_digest != schema_digest(schema):
        raise rejected(header, "schema", "the header's schema digest is another")
    if header.payload_sizes.keys() != {spec.name.split("/", 1)[0] for spec in schema}:
        raise rejected(header, "schema", "other groups of arrays than ordered")
    try:
        require_payload(header, sealed.payload, max_bytes=rules.payload_cap())
    except PayloadError as error:
        raise rejected(header, error.reason, str(error)) from None
    require_order(header, rules)
    if rules.wire == "float32":
        return SiteUpdate(header, unpack_whole(sealed.payload))
    return SiteUpdate(header, decode(sealed.payload, rules.base, wire=rules.wire))


def require_own_refusal(sealed: SealedRefusal, rules: AdmissionRules, *, asked: str) -> None:
    """On a signed connection, a refusal must be signed by the site that was asked.

    Raises:
        UpdateRejectedError: ``signature``, or ``nonce`` when it answers another order.
    """
    if rules.keys is None:
        return
    try:
        verify(sealed.refusal, sealed.signature, rules.keys.get(asked, ()))
    except SignatureError as error:
        raise _of(asked, "signature", str(error).rstrip(".")) from None
    if sealed.refusal.nonce != rules.nonces.get(asked):
        raise _of(asked, "nonce", "another order's refusal")


def _require_site(header: UpdateHeader, rules: AdmissionRules, *, asked: str) -> None:
    if header.site != asked:
        raise _of(asked, "site", "its reply bears another site's name")
    require_asked(header, rules)


def _require_signature(sealed: SealedUpdate, rules: AdmissionRules) -> None:
    if rules.keys is None:
        return
    try:
        verify(sealed.header, sealed.signature, rules.keys.get(sealed.header.site, ()))
    except SignatureError as error:
        raise rejected(sealed.header, "signature", str(error).rstrip(".")) from None


def _of(site: str, reason: str, detail: str) -> UpdateRejectedError:
    return UpdateRejectedError(
        f"site '{site}': {REASONS[reason]} ({detail}). The round goes on without this site.",
        site=site,
        reason=reason,
    )
