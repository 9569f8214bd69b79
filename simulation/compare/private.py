"""Which models say what privacy is worth: each level of it, from random weights and continued."""

from collections.abc import Mapping

from agssd_core.config import Cohort

EPSILONS = (8, 3, 1)
PLAIN, NOISELESS = "plain", "noiseless"
LEVELS = (PLAIN, NOISELESS, *(f"epsilon-{epsilon}" for epsilon in EPSILONS))
"""``plain``: the ordinary step. ``noiseless``: the private step (patients drawn, clipped one by
one, private recipe) without noise, so that the cost of the recipe is not taken for that of the
noise."""
SCRATCH, CONTINUED = "scratch", "continued"
SOURCES = (SCRATCH, CONTINUED)
"""From random weights, and from ``init.checkpoint``."""

# What the guard of privacy wants, beside what the presets have.
_RECIPE: Mapping[Cohort, tuple[str, ...]] = {
    "ct-mr": (
        "agssd.eaam.kappa=0",
        "agssd.model.drop_path=0",
        "agssd.head.input_norm_cls=none",
        "agssd.head.input_norm_patch=volume",
        "agssd.target.patch=volume",
    ),
    "us": ("anaus.backbone.norm=group", "anaus.share_statistics=false"),
}


def name_of(level: str, source: str) -> str:
    """A variant's name."""
    return f"{level}-{source}"


def private_variants(cohort: Cohort) -> dict[str, tuple[str, ...]]:
    """Name -> overrides of the federated arm; ``privacy`` of the file says all but the noise."""
    return {
        name_of(level, source): _overrides(level, cohort) for source in SOURCES for level in LEVELS
    }


def starts_from_nothing(variant: str) -> bool:
    """Whether a variant is one from random weights, whatever ``init.checkpoint`` names."""
    return variant in {name_of(level, SCRATCH) for level in LEVELS}


def _overrides(level: str, cohort: Cohort) -> tuple[str, ...]:
    if level == PLAIN:
        return ("privacy.enabled=false", "privacy.target_epsilon=0")
    private = ("privacy.enabled=true", "monitor.stop_on_collapse=false", *_RECIPE[cohort])
    if level == NOISELESS:
        return (
            *private,
            "privacy.secure_noise=false",
            "privacy.noise_multiplier=0",
            "privacy.target_epsilon=0",
            "privacy.epsilon_budget=0",
        )
    epsilon = level.removeprefix("epsilon-")
    return (*private, f"privacy.target_epsilon={epsilon}", f"privacy.epsilon_budget={epsilon}")
