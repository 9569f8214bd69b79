"""Which rounds a site took, which it missed, and what to do about refused updates."""

from server.run_record import RunRecord, SiteRecord

_ABSENT = ("late", "lost", "missed", "no-reply", "timeout")
_REMEDY = {
    "norm": "Look at that site's curves first; raise federation.max_update_norm only if they "
    "look like those of the others.",
    "magnitude": "Look at that site's curves; its training has probably diverged.",
    "weight": "Compare the site's patient count with its enrolment.",
    "size": "Check that the site builds the same model.",
    "digest": "The upload was damaged; check the network path and the site's disk.",
    "signature": "Compare the site's signing key with its enrolment; if they agree, somebody else "
    "has answered in its name.",
    "declined-signature": "The site knows another coordinator's key, or the server does not sign. "
    "Compare the key with the site's.",
    "protocol": "Upgrade the older side; the server's log says which it is.",
}
_AGSSD_REMEDY = {
    "non-finite": "Lower training.optimiser.learning_rate, or train with precision = fp32.",
    "declined-collapsed": "Its targets collapsed and it kept the update. Look at its curves: raise "
    "the batch size or lower the EMA momentum, and keep the teacher's temperature at 0.04.",
}
_ANAUS_REMEDY = {
    "non-finite": "Lower anaus.optimiser.learning_rate, or train with precision = fp32.",
    "declined-collapsed": "Its projections collapsed and it kept the update. Look at its curves "
    "and its label maps: keep anaus.loss.align on, raise anaus.batch_size or lower the learning "
    "rate.",
}


def refusal_remedy(reason: str, cohort: str) -> str:
    """What to do about an update that was refused for this reason."""
    own = _ANAUS_REMEDY if cohort == "us" else _AGSSD_REMEDY
    other = "Compare software version and configuration with the site."
    return own.get(reason) or _REMEDY.get(reason, other)


def expected_absence(reason: str) -> bool:
    """Whether a refusal row stands for a reply that never came or came too late."""
    return any(word in reason.lower() for word in _ABSENT)


def missed_rounds(run: RunRecord, site: SiteRecord) -> int:
    """Closed rounds with neither an update nor a refusal of content from this site."""
    taken = {row.round for row in site.rows}
    refused = {row.round for row in site.refusals if not expected_absence(row.reason)}
    return len({row.round for row in run.merges} - taken - refused)
