"""Differential privacy of a site's part in the merged weights, added by the server."""

from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from agssd_core.config.node import Node, require, within

if TYPE_CHECKING:
    from agssd_core.config.federation import FederationConfig
    from agssd_core.config.run import RunConfig

KEY = "merge.central_privacy"
UNCLIPPED_RULES = ("trimmed-mean", "median", "krum", "norm-clip", "l-dawa")


class CentralPrivacyConfig(Node):
    """Every site's difference clipped, their sum noised. The unit is one site.

    Attributes:
        enabled: False merges as ever.
        clip_norm: C, greatest L2 norm of one site's difference over all that it sends: student,
            averaged teacher and running state together.
        noise_multiplier: sigma, deviation of the noise of the sum in units of ``clip_norm``.
        delta: of (epsilon, delta); far below 1 / sites.
    """

    enabled: bool = False
    clip_norm: float = 1.0
    noise_multiplier: float = 1.0
    delta: float = 0.01

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                within(f"{KEY}.clip_norm", self.clip_norm, 1e-6, 1e6),
                within(f"{KEY}.noise_multiplier", self.noise_multiplier, 0.01, 1e5),
                within(f"{KEY}.delta", self.delta, 1e-12, 0.5),
            ]
        )
        return self


def central_problems(config: "RunConfig") -> list[str]:
    """Everything that would break the guarantee; empty without ``central_privacy.enabled``."""
    found = []
    if "ct-mr" in config.cohorts and config.federation.merge.central_privacy.enabled:
        found += _rule_problems(config.federation) + _agssd_problems(config)
    ultrasound = config.anaus.federation or config.federation
    if "us" in config.cohorts and ultrasound.merge.central_privacy.enabled:
        found += _rule_problems(ultrasound)
        if config.anaus.share_statistics:
            found.append(
                "anaus.share_statistics sends second moments, which noise can make smaller than "
                f"the square of the mean. Set anaus.share_statistics = false under {KEY}."
            )
    return list(dict.fromkeys(found))


def _rule_problems(federation: "FederationConfig") -> list[str]:
    merge, found = federation.merge, []
    if merge.student in UNCLIPPED_RULES:
        found.append(
            f"merge.student = {merge.student} looks at single updates before they are clipped and "
            f"noised; {KEY} cannot be promised. Set merge.student = fedavg."
        )
    if merge.weighting != "uniform":
        found.append(
            f"merge.weighting = {merge.weighting} would let one site move the merged weights by "
            f"more than {KEY} counts. Set merge.weighting = uniform."
        )
    if federation.late == "stale":
        found.append(
            "federation.late = stale merges differences to other weights, unclipped; "
            f"{KEY} cannot be promised. Set federation.late = discard."
        )
    if federation.max_update_norm > 0:
        found.append(
            "federation.max_update_norm tells by a refusal how long a site's difference is; "
            f"{KEY} clips it instead. Set federation.max_update_norm = 0."
        )
    sites = max(federation.min_sites, federation.expected_sites)
    if merge.central_privacy.delta * sites >= 1:
        found.append(
            f"{KEY}.delta = {merge.central_privacy.delta:g} is not below 1 / {sites} sites, so it "
            "promises nothing. Lower it."
        )
    return found


def _agssd_problems(config: "RunConfig") -> list[str]:
    agssd, found = config.agssd, []
    # Under privacy of patients, auto is none.
    running = ("ema",) if config.privacy.enabled else ("ema", "auto")
    if agssd.head.input_norm_cls in running:
        found.append(
            f"agssd.head.input_norm_cls = {agssd.head.input_norm_cls} may share a variance, which "
            f"the noise of {KEY} can make negative. Set agssd.head.input_norm_cls = none or batch."
        )
    if agssd.eaam.enabled and agssd.eaam.kappa != 0:
        found.append(
            "agssd.eaam.kappa (adaptive mask ratio) steers by a running statistic that the noise "
            f"of {KEY} drowns. Set agssd.eaam.kappa = 0."
        )
    return found
