"""Which weights a run starts from."""

import re
from typing import Self

from pydantic import Field, model_validator

from agssd_core.config.federation import Cohort
from agssd_core.config.node import Node, require

ByCohort = str | dict[Cohort, str]


class InitConfig(Node):
    """A checkpoint to go on from, in place of random weights; optimisers start afresh.

    Attributes:
        checkpoint: a run's folder (its newest round), one checkpoint's folder or its
            ``weights.safetensors``; with several cohorts ``{ct-mr: PATH, us: PATH}``, where a
            cohort that is not named starts from random weights. As other paths it is in no dump.
        digest: SHA-256 of its arrays, as its manifest's ``weights_digest``. Empty takes the
            checkpoint as it is; the run records what it was, and goes on with no other.
    """

    checkpoint: ByCohort = Field(default="", exclude=True)
    digest: ByCohort = ""

    def of(self, cohort: Cohort) -> "InitConfig":
        """One cohort's own part."""
        return InitConfig(
            checkpoint=_own(self.checkpoint, cohort), digest=_own(self.digest, cohort)
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.digest.values() if isinstance(self.digest, dict) else (self.digest,)
        require(
            f"init.digest = {digest!r} is no SHA-256. Use a manifest's weights_digest."
            for digest in given
            if digest and not re.fullmatch("[0-9a-f]{64}", digest)
        )
        return self

    def problems(self, cohorts: tuple[Cohort, ...]) -> list[str]:
        """What does not go with the cohorts of a run."""
        found = []
        for key, given in (("checkpoint", self.checkpoint), ("digest", self.digest)):
            if isinstance(given, dict):
                found += [
                    f"init.{key} names cohort {name}, which the run does not train. Leave it out."
                    for name in given
                    if name not in cohorts
                ]
            elif given and len(cohorts) > 1:
                found.append(
                    f"init.{key} is one for {len(cohorts)} cohorts, and no checkpoint fits two. "
                    f"Name one by cohort, as in init.{key}: {{{cohorts[0]}: ...}}."
                )
        return found


def _own(given: ByCohort, cohort: Cohort) -> str:
    return given.get(cohort, "") if isinstance(given, dict) else given
