"""The page's part on whole sites: what the server's clipping and noise is worth."""

from server.central_accounts import CentralAccount
from server.privacy_blocks import Block
from server.privacy_facts import RunPrivacy, shown_name

HEAD = ("site", "noised merges", "epsilon, this run", "delta")


def central_blocks(run: RunPrivacy) -> list[Block]:
    """Nothing for a run whose merges were not noised."""
    account = run.central
    if account is None:
        return []
    return [
        Block("heading", "Whole sites: clipped and noised by the server"),
        Block("warning", f"Central privacy: {account.worth()}"),
        Block("table", rows=(HEAD, *(_row(account, site) for site in account.rounds))),
        Block("list", rows=tuple((row,) for row in _terms(run, account))),
    ]


def _row(account: CentralAccount, site: str) -> tuple[str, ...]:
    merges = str(account.rounds[site])
    return (shown_name(site), merges, f"{account.epsilon(site):.3f}", f"{account.delta:g}")


def _terms(run: RunPrivacy, account: CentralAccount) -> tuple[str, ...]:
    names = ", ".join(run.metrics) or "none"
    return (
        f"In every merge each site's difference was scaled down to norm {account.clip_norm:g} over "
        "all that it sent, and the sum got normal noise of "
        f"{account.noise_multiplier:g} times that, from a key of the operating system.",
        "Protected: what merged weights, and all made of them, tell of one site's part. "
        "Neighbouring runs differ in what that site sent, or nothing in its place.",
        "Not protected: that a site took part, declined or was refused, its counts of patients and "
        f"scans, its timings, and the numbers that it reported beside the weights: {names}.",
        "Not protected against the coordinator, who receives each update as it was sent.",
        "A site pays in full for every noised merge that it is in, also when sites are drawn: who "
        "was drawn is in the manifests. A round merged again after a crash counts again.",
        "Other runs with the same sites are not counted here; their epsilons add.",
    )
