"""What a site's owner allows: the content of SITE/policy.yaml. No order can change it."""

import re
from datetime import datetime, timedelta
from typing import Any, Literal, Self, get_args

from pydantic import field_validator, model_validator

from agssd_core.config.federation import Cohort
from agssd_core.config.node import Node, require, within

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = get_args(Day)
_MINUTES_A_DAY = 24 * 60


def _minutes(text: str) -> int | None:
    found = re.fullmatch(r"(\d{2}):([0-5]\d)", text)
    if found is None:
        return None
    minutes = int(found.group(1)) * 60 + int(found.group(2))
    return minutes if minutes <= _MINUTES_A_DAY else None


def _digest_problems(key: str, digests: tuple[str, ...]) -> list[str]:
    wrong = [one for one in digests if not re.fullmatch(r"[0-9a-f]{64}", one)]
    return [f"{key}: {one[:12]!r} is no SHA-256 of 64 small hexadecimal digits." for one in wrong]


class HoursPolicy(Node):
    """A window of local time in which orders are taken.

    Attributes:
        days: on which the window begins.
        begin, end: ``HH:MM``; an end before the begin lies on the next day.
    """

    days: tuple[Day, ...] = DAYS
    begin: str = "00:00"
    end: str = "24:00"

    @field_validator("begin", "end", mode="before")
    @classmethod
    def _as_text(cls, given: Any) -> Any:
        """YAML reads 19:30 without quotes as a number to base 60, which is minutes here."""
        if isinstance(given, int) and not isinstance(given, bool):
            return f"{given // 60:02d}:{given % 60:02d}"
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = [
            f"hours.{name} = {text!r} is no time of day. Write it as '19:30'."
            for name, text in (("begin", self.begin), ("end", self.end))
            if _minutes(text) is None
        ]
        if not found and self.begin == self.end:
            found.append("a window of hours has no length. Use begin '00:00' and end '24:00'.")
        found.append(
            "" if self.days else "a window of hours has no days. Name some, or none at all."
        )
        require(found)
        return self

    def holds(self, moment: datetime) -> bool:
        """Whether a local time lies within the window."""
        begin, end = _minutes(self.begin) or 0, _minutes(self.end) or 0
        now = moment.hour * 60 + moment.minute
        today = DAYS[moment.weekday()] in self.days
        if begin < end:
            return today and begin <= now < end
        yesterday = DAYS[(moment - timedelta(days=1)).weekday()] in self.days
        return (today and now >= begin) or (yesterday and now < end)

    def in_words(self) -> str:
        """As `agssd-site policy show` says it."""
        days = "every day" if self.days == DAYS else ", ".join(self.days)
        return f"{self.begin} to {self.end}, {days}"


class CodePolicy(Node):
    """Which applications are answered.

    Attributes:
        applications: SHA-256 of bundles. Empty is the one that the installed version makes, and
            no other: what the coordinator sends can then never widen the list.
    """

    applications: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(_digest_problems("code.applications", self.applications))
        return self


class WorkPolicy(Node):
    """How much and how little an order may ask for.

    Gradients of one step on one image give the image away (Geiping et al. 2020,
    arXiv:2003.14053); several steps on several images blur it, hence the least values.

    Attributes:
        rounds, steps_per_round: most that a plan may hold.
        least_steps, least_batch: of one round and of one step.
        least_images: steps of a round times the batch of a step, volumes or frames.
        order_megabytes: most that the arrays of an order may have; of a larger one they are not
            fetched.
    """

    rounds: int = 1000
    steps_per_round: int = 5000
    least_steps: int = 2
    least_batch: int = 2
    least_images: int = 16
    order_megabytes: float = 4096.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = [
            within("work.rounds", self.rounds, 1, 100000),
            within("work.steps_per_round", self.steps_per_round, 1, 1000000),
            within("work.least_steps", self.least_steps, 1, 1000000),
            within("work.least_batch", self.least_batch, 1, 4096),
            within("work.least_images", self.least_images, 1, 10**9),
            within("work.order_megabytes", self.order_megabytes, 0.001, 1e6),
        ]
        if self.least_steps > self.steps_per_round:
            found.append("work.least_steps is more than work.steps_per_round. Lower the first.")
        require(found)
        return self


class BoundPolicy(Node):
    """What one setting of a plan may be.

    Attributes:
        key: dotted, as ``training.batch_size``. A plan without it is refused.
        least, most: of a number.
        among: the values that are allowed.
    """

    key: str
    least: float | None = None
    most: float | None = None
    among: tuple[str | int | float | bool, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        plain = bool(re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", self.key))
        bounded = self.least is not None or self.most is not None or bool(self.among)
        require(
            [
                "" if plain else f"plans.bounds: {self.key!r} is no dotted key of a configuration.",
                "" if bounded else f"plans.bounds: {self.key} says no least, most or among.",
            ]
        )
        return self

    def holds(self, value: object) -> bool:
        """Whether a setting is within the bound."""
        if self.among and not any(
            value == each and type(value) is type(each) for each in self.among
        ):
            return False
        if self.least is None and self.most is None:
            return True
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        low = self.least if self.least is not None else float("-inf")
        high = self.most if self.most is not None else float("inf")
        return low <= value <= high


class PlansPolicy(Node):
    """Which plans are taken.

    Attributes:
        digests: SHA-256 of configurations as `agssd-site policy check --config` prints them;
            empty is every configuration within the bounds.
        bounds: of single settings.
    """

    digests: tuple[str, ...] = ()
    bounds: tuple[BoundPolicy, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(_digest_problems("plans.digests", self.digests))
        return self


class LeavesPolicy(Node):
    """What may leave the site in an update; all else stays whatever an order says.

    Attributes:
        groups: of arrays. arrays: patterns of their names with ``*`` and ``?``; an array that is
            asked for and fits none makes the whole order refused. Shapes are those of the
            order's own weights, always.
        megabytes: most in one update, as float32.
        metrics: patterns; a metric that fits none stays, and the order is answered without it.
    """

    groups: tuple[Literal["student", "teacher", "state"], ...] = ("student", "teacher", "state")
    arrays: tuple[str, ...] = ("*",)
    megabytes: float = 2048.0
    metrics: tuple[str, ...] = ("*",)

    @model_validator(mode="after")
    def _check(self) -> Self:
        require([within("leaves.megabytes", self.megabytes, 0.001, 1e6)])
        return self


class PrivacyPolicy(Node):
    """Most that private training may spend on the site's patients, over all runs.

    Attributes:
        epsilon_budget, delta: a private plan may ask for no more; the site's ledger adds up what
            all plans have spent.
    """

    epsilon_budget: float = 8.0
    delta: float = 1e-5

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                within("privacy.epsilon_budget", self.epsilon_budget, 0, 1e6),
                within("privacy.delta", self.delta, 1e-12, 0.1),
            ]
        )
        return self


class LpsamPolicy(Node):
    """``digests``: SHA-256 of files of LP-SAM that `agssd-site delineate` takes."""

    digests: tuple[str, ...] = ()


class SitePolicy(Node):
    """The whole file. What it leaves out stands at the cautious values given here.

    Attributes:
        hours: windows in which orders are taken; empty is any time.
        require_privacy: plans without ``privacy.enabled`` and secure noise are refused.
    """

    cohorts: tuple[Cohort, ...] = ("ct-mr", "us")
    hours: tuple[HoursPolicy, ...] = ()
    code: CodePolicy = CodePolicy()
    work: WorkPolicy = WorkPolicy()
    plans: PlansPolicy = PlansPolicy()
    leaves: LeavesPolicy = LeavesPolicy()
    require_privacy: bool = False
    privacy: PrivacyPolicy = PrivacyPolicy()
    lpsam: LpsamPolicy = LpsamPolicy()
