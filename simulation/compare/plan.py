"""Which models a comparison trains, and the configuration of each."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omegaconf import OmegaConf

from agssd_core.config import Cohort, InitConfig, RunConfig, dump_config, parse_config
from agssd_core.config.compare import Arm, CompareConfig
from agssd_core.errors import ConfigError
from simulation.compare.private import private_variants, starts_from_nothing

POOLED = "pooled"
# A part of the method, the merging or the wire, switched: name -> overrides of the federated arm.
ABLATIONS: Mapping[Cohort, Mapping[str, tuple[str, ...]]] = {
    "ct-mr": {
        "no-cvac": ("agssd.cvac.enabled=false",),
        "no-eaam": ("agssd.eaam.enabled=false",),
        "no-cvaa": ("agssd.cvaa.mode='off'",),
        "no-cvac-eaam-cvaa": (
            "agssd.cvac.enabled=false",
            "agssd.eaam.enabled=false",
            "agssd.cvaa.mode='off'",
        ),
    },
    "us": {
        "alignment-only": ("anaus.loss.context=0",),
        "core-region-only": ("anaus.loss.align=0",),
    },
}
_FEDAVG = "federation.merge.student=fedavg"
MERGING: Mapping[str, tuple[str, ...]] = {
    "teacher-average": (_FEDAVG, "federation.merge.teacher=average"),
    "teacher-server-ema": (_FEDAVG, "federation.merge.teacher=server-ema"),
    "teacher-local": (_FEDAVG, "federation.merge.teacher=local"),
    "teacher-copy": (_FEDAVG, "federation.merge.teacher=copy"),
    "fedprox": ("federation.merge.student=fedprox", "federation.merge.teacher=auto"),
    "fedema": ("federation.merge.student=fedema", "federation.merge.teacher=auto"),
    "wire-bf16": ("federation.wire=bf16",),
    "wire-int8": ("federation.wire=int8",),
}


@dataclass(frozen=True)
class Model:
    """One model to train and judge.

    Attributes:
        site: of arm ``alone``; empty for the others.
        variant: name of an ablation or a level of privacy; empty is the configuration as it
            stands.
    """

    seed: int
    arm: Arm
    site: str = ""
    variant: str = ""

    @property
    def name(self) -> str:
        """A folder's name, unique within the seed."""
        return "-".join(part for part in (self.arm, self.site, self.variant) if part)


def cohort_of(settings: RunConfig) -> Cohort:
    """The one cohort that is compared.

    Raises:
        ConfigError: there are several.
    """
    if len(settings.cohorts) != 1:
        raise ConfigError(
            f"{len(settings.cohorts)} cohorts are configured, a comparison is of one. Use "
            "cohorts=[ct-mr] or cohorts=[us]."
        )
    return settings.cohorts[0]


def models_of(settings: RunConfig, sites: Sequence[str], *, seed: int) -> list[Model]:
    """The models of one seed, arm by arm.

    Raises:
        ConfigError: arm ``start`` has no checkpoint to be.
    """
    if "start" in settings.compare.arms:
        _require_start(settings)
    found: list[Model] = []
    for arm in settings.compare.arms:
        names = sites if arm == "alone" else ("",)
        found += [Model(seed, arm, site) for site in names]
    return found


def ablated_models(settings: RunConfig, *, seed: int) -> list[Model]:
    """The federated arm as it stands, with the switches asked for, and untrained.

    Raises:
        ConfigError: ``compare.variants`` names one that the cohort does not have.
    """
    cohort = cohort_of(settings)
    known = (*ABLATIONS[cohort], *MERGING)
    unknown = [name for name in settings.compare.variants if name not in known]
    if unknown:
        raise ConfigError(
            f"compare.variants names {unknown[0]!r}, which cohort {cohort} does not have. There "
            f"are {', '.join(known)}."
        )
    variants = ("", *(settings.compare.variants or known))
    found = [Model(seed, "federated", variant=variant) for variant in variants]
    return [*found, Model(seed, "random")]


def private_models(settings: RunConfig, *, seed: int) -> list[Model]:
    """Every level of privacy from nothing and continued, what they start from, and untrained.

    Raises:
        ConfigError: there is no checkpoint to continue from.
    """
    _require_start(settings)
    variants = private_variants(cohort_of(settings))
    found = [Model(seed, "federated", variant=variant) for variant in variants]
    return [*found, Model(seed, "start"), Model(seed, "random")]


def _require_start(settings: RunConfig) -> None:
    if not settings.for_cohort(cohort_of(settings)).init.digest:
        raise ConfigError(
            "init.checkpoint is empty, so there is no starting checkpoint to compare with. Name "
            "one, such as the folder of a finished run."
        )


def model_config(settings: RunConfig, model: Model, sites: Sequence[str]) -> RunConfig:
    """A model's own run: seed, budget, batch and merging.

    Every arm takes rounds x steps_per_round optimiser updates. The pooled batch is the sum of
    the sites' batches, so that it sees as many scans as the federation does.

    Args:
        settings: of the comparison.
        model: which.
        sites: names of the sites that train together in the federated arm.
    """
    cohort = cohort_of(settings)
    # What is asked of a model, and of which other models, is not part of its own run.
    own = {"seed": model.seed, "name": model.name, "compare": CompareConfig()}
    config = settings.for_cohort(cohort).model_copy(update=own)
    taking_part = len(sites) if model.arm in ("federated", "random", "start") else 1
    plan = config.federation.model_copy(
        update={
            "expected_sites": taking_part,
            "min_sites": taking_part,
            "sites_per_round": 0,
            "keep": 1,
        }
    )
    config = config.model_copy(update={"federation": plan})
    if model.arm == "random" or starts_from_nothing(model.variant):
        config = config.model_copy(update={"init": InitConfig()})
    if model.arm == "pooled":
        config = _with_batch(config, cohort, factor=len(sites))
    return _varied(config, cohort, model.variant)


def stamp_of(config: RunConfig, data_digest: str) -> str:
    """Of everything that decides a model's weights but its name."""
    text = f"{dump_config(config.model_copy(update={'name': 'x', 'output': ''}))}/{data_digest}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _with_batch(config: RunConfig, cohort: Cohort, *, factor: int) -> RunConfig:
    if config.privacy.enabled:
        drawn = {"expected_batch": config.privacy.expected_batch * factor}
        return config.model_copy(update={"privacy": config.privacy.model_copy(update=drawn)})
    if cohort == "us":
        anaus = config.anaus
        larger = anaus.model_copy(update={"batch_size": anaus.batch_size * factor})
        return config.model_copy(update={"anaus": larger})
    training = config.training
    wide = training.model_copy(update={"batch_size": training.batch_size * factor})
    return config.model_copy(update={"training": wide})


def _varied(config: RunConfig, cohort: Cohort, variant: str) -> RunConfig:
    """Lay a variant's overrides over a configuration, and check the result as a whole.

    Raises:
        ConfigError: there is no such variant, or it does not go with the configuration.
    """
    if not variant:
        return config
    overrides = {**ABLATIONS[cohort], **MERGING, **private_variants(cohort)}.get(variant)
    if overrides is None:
        raise ConfigError(f"there is no variant {variant!r}.")
    changed = parse_config(OmegaConf.create(dump_config(config)), overrides)
    return changed.model_copy(update={"init": config.init})  # not part of a dump
