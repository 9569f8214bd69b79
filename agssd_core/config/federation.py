"""Rounds, merging rules and admission, and which of them may go together."""

from typing import Literal, Self

from pydantic import model_validator

from agssd_core.config.central_privacy import CentralPrivacyConfig
from agssd_core.config.node import Node, Range2, ScanModality, ordered, require, within
from agssd_core.differences import Wire

Cohort = Literal["ct-mr", "us"]
COHORT_OF: dict[ScanModality, Cohort] = {"CT": "ct-mr", "MR": "ct-mr", "US": "us"}
StudentRule = Literal[
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedema",
    "l-dawa",
    "trimmed-mean",
    "median",
    "krum",
    "norm-clip",
]
TeacherRule = Literal["average", "server-ema", "local", "copy"]
LINEAR_RULES = ("fedavg", "fedprox", "fedema")
ROBUST_RULES = ("trimmed-mean", "median", "krum", "norm-clip")
STALE_RULES = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi")


class MergeConfig(Node):
    """Student and teacher rules.

    Attributes:
        student: rule for the student's weights.
        teacher: T1 ``average``, T2 ``server-ema``, T3 ``local``, T4 ``copy``; ``auto`` is T1 for
            linear student rules and Krum, T3 for fedema, T2 for the others.
        weighting: what p_k is proportional to; ``patients`` are those of the enrolment.
        max_weight: greatest share of one site (1 / sites when that is more). Robust rules but
            norm-clip give every site one vote instead.
        server_learning_rate: eta_s; 1 merges in the weight form, bit for bit.
        prox_mu: FedProx strength. server_momentum: fedavgm. server_betas, server_epsilon:
            fedadam and fedyogi.
        trim: sites cut from each end by the trimmed mean. krum_f: hostile sites tolerated.
        krum_keep: updates averaged by multi-Krum (1 is Krum).
        clip_factor: norm-clip limit as a multiple of the running median update norm.
        ema_tau: fedema's scaler target.
        central_privacy: clip and noise what is merged, for the privacy of a whole site.
    """

    student: StudentRule = "fedavg"
    teacher: TeacherRule | Literal["auto"] = "auto"
    weighting: Literal["patients", "steps", "uniform"] = "patients"
    max_weight: float = 0.4
    server_learning_rate: float = 1.0
    prox_mu: float = 0.01
    server_momentum: float = 0.9
    server_betas: Range2 = (0.9, 0.99)
    server_epsilon: float = 1e-3
    trim: int = 1
    krum_f: int = 1
    krum_keep: int = 1
    clip_factor: float = 1.0
    ema_tau: float = 0.7
    central_privacy: CentralPrivacyConfig = CentralPrivacyConfig()

    @property
    def teacher_rule(self) -> TeacherRule:
        """The rule that ``auto`` stands for."""
        if self.teacher != "auto":
            return self.teacher
        if self.student == "fedema":
            return "local"
        linear = self.student in (*LINEAR_RULES, "krum") and self.server_learning_rate == 1
        return "average" if linear else "server-ema"

    @property
    def is_robust(self) -> bool:
        """Whether the rule bounds what a hostile site can do; it then guards state as well."""
        return self.student in ROBUST_RULES

    @property
    def uploaded_groups(self) -> tuple[str, ...]:
        """Groups of arrays that a site sends: teachers only when they are averaged."""
        teacher = ("teacher",) if self.teacher_rule == "average" else ()
        return ("student", *teacher, "state")

    @property
    def required_sites(self) -> int:
        """Least number of updates that the student rule is defined for."""
        return {
            "trimmed-mean": 2 * self.trim + 1,
            "krum": max(2 * self.krum_f + 3, self.krum_keep + self.krum_f + 2),
            "median": 3,
            "norm-clip": 2,
        }.get(self.student, 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = [
            within("merge.max_weight", self.max_weight, 0.01, 1),
            within("merge.server_learning_rate", self.server_learning_rate, 1e-6, 100),
            within("merge.prox_mu", self.prox_mu, 0, 100),
            within("merge.server_momentum", self.server_momentum, 0, 0.9999),
            ordered("merge.server_betas", self.server_betas, 0, 0.99999),
            within("merge.server_epsilon", self.server_epsilon, 1e-12, 1),
            within("merge.trim", self.trim, 1, 1000),
            within("merge.krum_f", self.krum_f, 0, 1000),
            within("merge.krum_keep", self.krum_keep, 1, 1000),
            within("merge.clip_factor", self.clip_factor, 0.01, 100),
            within("merge.ema_tau", self.ema_tau, 0, 1),
        ]
        if self.teacher_rule == "average" and not (
            self.student in (*LINEAR_RULES, "krum") and self.server_learning_rate == 1
        ):
            found.append(
                f"merge.teacher = average is not the EMA of a student merged by "
                f"{self.student} (server_learning_rate {self.server_learning_rate:g}), and lets a "
                "hostile teacher past a robust rule. Use merge.teacher = server-ema."
            )
        if self.student == "fedema" and self.teacher_rule != "local":
            found.append("merge.student = fedema keeps teachers at the sites. Use teacher = local.")
        require(found)
        return self


WAITING = ("deadline_s", "poll_s", "discovery_timeout_s", "keep", "delivery_s")
"""Keys of waiting and keeping: they decide nothing of what is trained."""


class FederationConfig(Node):
    """The rounds of one cohort.

    Attributes:
        cohort: which sites train this model together.
        rounds, steps_per_round: R and S; every site takes exactly S optimiser steps a round.
        min_sites: quorum; fewer usable updates leave the weights unchanged.
        sites_per_round: 0 is all; otherwise a seeded sample of that many.
        deadline_s: per order, from its push; poll_s: pause between polls.
        late: ``discard`` or ``stale`` (decayed difference against its own base, T2 only).
        stale_decay: factor per round of age. max_update_norm: 0 is no limit, else the greatest
            L2 norm of an update relative to the base's norm.
        expected_sites: how many the first round waits for, for ``discovery_timeout_s``; also the
            learning-rate rule's sites of a round, hence fixed for a run. 0 is not said.
        keep: how many round checkpoints stay on disk beside the newest; 0 keeps all.
        wire: how weights travel: ``float32`` whole, or as ``bf16`` or ``int8`` differences.
        delivery_s: how long a signed run waits, after its last round, for sites that are not on
            line to fetch the final checkpoint.
    """

    cohort: Cohort = "ct-mr"
    rounds: int = 20
    steps_per_round: int = 10
    min_sites: int = 1
    expected_sites: int = 0
    sites_per_round: int = 0
    deadline_s: float = 86400.0
    poll_s: float = 1.0
    discovery_timeout_s: float = 300.0
    late: Literal["discard", "stale"] = "discard"
    stale_decay: float = 0.5
    max_update_norm: float = 0.0
    keep: int = 0
    wire: Wire = "float32"
    delivery_s: float = 60.0
    merge: MergeConfig = MergeConfig()

    @property
    def total_steps(self) -> int:
        """G, the steps that every schedule runs over."""
        return self.rounds * self.steps_per_round

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = [
            within("federation.rounds", self.rounds, 1, 100000),
            within("federation.steps_per_round", self.steps_per_round, 1, 1000000),
            within("federation.min_sites", self.min_sites, 1, 10000),
            within("federation.expected_sites", self.expected_sites, 0, 10000),
            within("federation.sites_per_round", self.sites_per_round, 0, 10000),
            within("federation.deadline_s", self.deadline_s, 0.1, 30 * 86400),
            within("federation.poll_s", self.poll_s, 0.001, 3600),
            within("federation.discovery_timeout_s", self.discovery_timeout_s, 0.1, 7 * 86400),
            within("federation.stale_decay", self.stale_decay, 0, 1),
            within("federation.max_update_norm", self.max_update_norm, 0, 1e9),
            within("federation.keep", self.keep, 0, 100000),
            within("federation.delivery_s", self.delivery_s, 0, 30 * 86400),
        ]
        found += self._late_problems() + self._quorum_problems()
        require(found)
        return self

    def _late_problems(self) -> list[str]:
        if self.late == "discard":
            return []
        found = []
        if self.merge.teacher_rule != "server-ema":
            found.append(
                "federation.late = stale needs a teacher that is not averaged. Use "
                "merge.teacher = server-ema, or late = discard."
            )
        if self.merge.student not in STALE_RULES:
            found.append(
                f"federation.late = stale cannot be used with merge.student = "
                f"{self.merge.student}: a late update would pass it by. Use late = discard."
            )
        return found

    def _quorum_problems(self) -> list[str]:
        merge, least = self.merge, self.min_sites
        needed = merge.required_sites
        found = []
        if least < needed:
            found.append(
                f"merge.student = {merge.student} needs at least {needed} sites in every round, "
                f"federation.min_sites is {least}. Raise it, or take another rule."
            )
        if 0 < self.sites_per_round < least:
            found.append(
                f"federation.sites_per_round = {self.sites_per_round} can never reach "
                f"federation.min_sites = {least}. Raise the first or lower the second."
            )
        if 0 < self.expected_sites < least:
            found.append(
                f"federation.expected_sites = {self.expected_sites} can never reach "
                f"federation.min_sites = {least}. Raise the first or lower the second."
            )
        return found
