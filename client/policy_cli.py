"""The verbs ``agssd-site policy init|show|check``."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from agssd_core.config import Cohort, RunConfig, dump_config
from agssd_core.config.load import load_config
from agssd_core.config.policy import SitePolicy
from agssd_core.console import say
from agssd_core.errors import ConfigError
from agssd_core.protocol import PROTOCOL_VERSION, RoundOrder
from agssd_core.weights import write_text
from client.objections import POLICY_FILE, Objection, objections, plan_digest
from client.policy import read_policy
from client.policy_text import DEFAULT_POLICY, in_words

app = typer.Typer(help="What the site's owner allows. No order can change it.")

SiteArgument = Annotated[Path, typer.Argument(help="The site's folder.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON, for scripts.")]
EXIT_REFUSED = 1


@app.command()
def init(site: SiteArgument) -> None:
    """Write policy.yaml with cautious values and a word on each, to be edited.

    Example: agssd-site policy init site
    """
    file = site / POLICY_FILE
    if file.exists():
        raise ConfigError(
            f"{POLICY_FILE} is there already and stays as it is. Edit it, or move it away first."
        )
    if not site.is_dir():
        raise ConfigError("there is no such folder. Make the site with `agssd-site index` first.")
    write_text(file, DEFAULT_POLICY)
    say(f"{POLICY_FILE} written; edit it, then use `agssd-site policy check`")


@app.command()
def show(site: SiteArgument, as_json: JsonOption = False) -> None:
    """Say in words what is allowed now.

    Example: agssd-site policy show site
    """
    policy = read_policy(site)
    if as_json:
        say(json.dumps(None if policy is None else policy.model_dump(mode="json")))
        return
    if policy is None:
        say(
            "no policy: the site is not enrolled and answers a server on its own machine only. "
            "Use `agssd-site policy init`."
        )
        return
    if not (site / POLICY_FILE).exists():
        say(f"no {POLICY_FILE}: an enrolled site then goes by these values")
    for name, text in in_words(policy):
        say(f"{name:<9} {text}")


@app.command()
def check(
    site: SiteArgument,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A plan to hold against the policy.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE laid over the plan.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check policy.yaml, and what it would say to the orders of a plan.

    Exit code 1 when an order would be refused.

    Example: agssd-site policy check site --config configs/agssd.yaml
    """
    policy = read_policy(site) or SitePolicy()
    if config is None:
        say(json.dumps({"valid": True}) if as_json else f"{POLICY_FILE} can be used")
        return
    run, now = load_config(config, override or ()), datetime.now(UTC).astimezone()
    orders = {name: _first_order(run.for_cohort(name)) for name in run.cohorts}
    found = {name: list(objections(policy, order, now=now)) for name, order in orders.items()}
    digests = {name: plan_digest(json.loads(order.config)) for name, order in orders.items()}
    if as_json:
        say(
            json.dumps(
                {
                    name: {"digest": digests[name], "objections": [asdict(one) for one in against]}
                    for name, against in found.items()
                }
            )
        )
    else:
        _say_judgement(found, digests)
    if any(found.values()):
        raise typer.Exit(EXIT_REFUSED)


def _say_judgement(found: Mapping[Cohort, list[Objection]], digests: Mapping[Cohort, str]) -> None:
    for name, against in found.items():
        say(f"{name}: {'would be refused' if against else 'would be carried out'}")
        say(f"  plan {digests[name]}")
        for one in against:
            say(f"  {one.reason}: {one.text}")


def _first_order(run: RunConfig) -> RoundOrder:
    """As a coordinator with this plan for a cohort would give it."""
    plan = run.federation
    return RoundOrder(
        protocol=PROTOCOL_VERSION,
        run="check",
        cohort=plan.cohort,
        round=0,
        steps=plan.steps_per_round,
        first_step=0,
        total_steps=plan.total_steps,
        config=dump_config(run),
        base_digest="",
        nonce="",
    )
