"""Differential privacy of a site's training, at the level of a patient."""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from agssd_core.config.agssd import AgssdConfig
from agssd_core.config.anaus import AnausConfig
from agssd_core.config.node import Node, require, within
from agssd_core.config.training import TrainingConfig

if TYPE_CHECKING:
    from agssd_core.config.run import RunConfig


class PrivacyConfig(Node):
    """DP-SGD: gradients clipped patient by patient, summed, noised.

    Attributes:
        enabled: False trains as ever and protects nobody.
        noise_multiplier: sigma, noise of the summed gradient in units of ``max_grad_norm``. 0, for
            experiments alone, takes private steps without noise, which protect nobody.
        target_epsilon: 0 takes ``noise_multiplier``; otherwise every site takes in its place the
            least noise with which the whole plan costs no more at its own number of patients.
        max_grad_norm: C, greatest norm of one patient's gradient over all views and terms.
        expected_batch: patients that a step draws on average. A public constant: what is summed
            is divided by it, however many were drawn.
        delta: of (epsilon, delta); far below 1 / patients.
        epsilon_budget: most that the whole plan may spend at a site; 0 sets no limit.
        mode: ``hooks`` keeps every patient's gradient; ``fast-gradient-clipping`` only its norm,
            for a second backward pass.
        physical_batch: most patients in one pass; bounds memory and never changes the result.
        secure_noise: noise and sampling by AES keyed from the operating system. False takes them
            from ``seed``, so that a test repeats: anybody can undo such noise, and what is
            trained so is marked as not private.
        centre_ratio: AG-SSD, noise of the cls centre in units of the gradient's; 0 keeps none.
        centre_norm: greatest norm of one patient's mean cls logits in that centre.
    """

    enabled: bool = False
    noise_multiplier: float = 1.0
    target_epsilon: float = 0.0
    max_grad_norm: float = 1.0
    expected_batch: float = 32.0
    delta: float = 1e-5
    epsilon_budget: float = 8.0
    mode: Literal["hooks", "fast-gradient-clipping"] = "hooks"
    physical_batch: int = 8
    secure_noise: bool = True
    centre_ratio: float = 4.0
    centre_norm: float = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                *self._noise_problems(),
                within("privacy.target_epsilon", self.target_epsilon, 0, 1e6),
                within("privacy.max_grad_norm", self.max_grad_norm, 1e-6, 1e6),
                within("privacy.expected_batch", self.expected_batch, 1, 1e6),
                within("privacy.delta", self.delta, 1e-12, 0.1),
                within("privacy.epsilon_budget", self.epsilon_budget, 0, 1e6),
                within("privacy.physical_batch", self.physical_batch, 1, 4096),
                within("privacy.centre_ratio", self.centre_ratio, 0, 1000),
                within("privacy.centre_norm", self.centre_norm, 1e-6, 1e6),
                "privacy.target_epsilon is above privacy.epsilon_budget, so every site would "
                "decline. Raise the budget or lower the target."
                if 0 < self.epsilon_budget < self.target_epsilon
                else "",
            ]
        )
        return self

    def _noise_problems(self) -> list[str]:
        if self.noise_multiplier != 0:
            return [within("privacy.noise_multiplier", self.noise_multiplier, 0.1, 1000)]
        if self.secure_noise or self.target_epsilon or self.epsilon_budget:
            return [
                "privacy.noise_multiplier = 0 promises nothing. Give it a value within "
                "[0.1, 1000]; or, to see what private steps cost without noise, set "
                "privacy.secure_noise = false, target_epsilon = 0 and epsilon_budget = 0."
            ]
        return []


def privacy_problems(config: "RunConfig") -> list[str]:
    """Everything in a run that would break the guarantee; empty without ``privacy.enabled``."""
    if not config.privacy.enabled:
        return []
    found = _loop_problems(config.training)
    if config.monitor.stop_on_collapse:
        found.append(
            "monitor.stop_on_collapse tells the server what the monitor saw of patients without "
            "noise. Set it to false under privacy."
        )
    if "ct-mr" in config.cohorts:
        found += _agssd_problems(config.agssd, config.privacy)
    if "us" in config.cohorts:
        found += _anaus_problems(config.anaus)
    return found


def _loop_problems(training: TrainingConfig) -> list[str]:
    refused = {
        "training.accumulate = 1": (
            training.accumulate > 1,
            "is gradient accumulation, which multiplies the sampling rate",
        ),
        "training.processes = 1": (training.processes > 1, "would each add noise of their own"),
        "training.precision = fp32": (
            training.precision != "fp32",
            "has no per-patient gradients here",
        ),
        "training.activation_checkpointing = false": (
            training.activation_checkpointing,
            "runs a forward pass twice, which would count a patient twice",
        ),
        "training.compile = false": (
            training.compile,
            "removes the hooks of per-patient gradients",
        ),
    }
    return _refusals(refused)


def _agssd_problems(agssd: AgssdConfig, privacy: PrivacyConfig) -> list[str]:
    """What couples patients, or keeps a running statistic of them without noise."""
    loss, head, target = agssd.loss, agssd.head, agssd.target
    coupled = "looks at several patients at once, so one patient's part of it is unbounded"
    unnoised = "is a running statistic of patients without noise"
    refused = {
        "agssd.loss.koleo = 0": (loss.koleo > 0, f"(KoLeo) {coupled}"),
        "agssd.loss.variance = 0": (loss.variance > 0, f"(variance over the batch) {coupled}"),
        "agssd.loss.align = 0": (loss.align > 0, "has no per-patient gradients here"),
        "agssd.loss.attn_sup = 0": (loss.attn_sup > 0, "has no per-patient gradients here"),
        "agssd.target.cls = auto": (target.cls == "sinkhorn", f"(Sinkhorn) {coupled}"),
        "agssd.target.patch = volume": (
            target.patch in ("sinkhorn", "center"),
            f"(Sinkhorn) {coupled}" if target.patch == "sinkhorn" else f"(centre) {unnoised}",
        ),
        "agssd.head.input_norm_cls = none": (
            head.input_norm_cls in ("batch", "ema"),
            f"(batch statistics) {coupled}" if head.input_norm_cls == "batch" else unnoised,
        ),
        "agssd.head.input_norm_patch = volume": (
            head.input_norm_patch == "batch",
            f"(batch statistics) {coupled}",
        ),
        "agssd.head.shared = false": (head.shared, "would standardise cls tokens as patches"),
        "agssd.eaam.kappa = 0": (
            agssd.eaam.enabled and agssd.eaam.kappa != 0,
            f"(adaptive mask ratio) {unnoised}",
        ),
        "agssd.model.masking = replace": (
            agssd.model.masking == "drop",
            "hides equally many tokens in every volume of a batch, so patients decide on others",
        ),
        "agssd.model.drop_path = 0": (
            agssd.model.drop_path > 0,
            "draws stochastic depth across the batch",
        ),
        "agssd.cvaa.p_drop = 0": (agssd.cvaa.p_drop > 0, "draws dropped views across the batch"),
        "agssd.cvac.pairs_per_volume = 1": (
            agssd.cvac.pairs_per_volume > 1,
            "makes one patient several units of a batch",
        ),
    }
    found = _refusals(refused)
    if loss.cls > 0 and (privacy.centre_ratio == 0 or target.cls == "none"):
        found.append(
            "agssd.loss.cls collapses without a centre, and only a noised one is private. Set "
            "privacy.centre_ratio = 4 and agssd.target.cls = auto, or agssd.loss.cls = 0."
        )
    if loss.cls == 0 and privacy.centre_ratio > 0:
        found.append(
            "privacy.centre_ratio pays for a centre that agssd.loss.cls = 0 does not use. Set "
            "privacy.centre_ratio = 0."
        )
    return found


def _anaus_problems(anaus: AnausConfig) -> list[str]:
    refused = {
        "anaus.backbone.norm = group": (
            anaus.backbone.norm == "batch",
            "(BatchNorm) mixes patients and keeps statistics of them without noise",
        ),
        "anaus.share_statistics = false": (
            anaus.share_statistics,
            "sends statistics of patients without noise",
        ),
    }
    return _refusals(refused)


def _refusals(refused: dict[str, tuple[bool, str]]) -> list[str]:
    """One line for each remedy whose condition holds: which key, why, what to set."""
    return [
        f"{remedy.split(' = ')[0]} {why}; privacy cannot be promised. Set {remedy}."
        for remedy, (holds, why) in refused.items()
        if holds
    ]
