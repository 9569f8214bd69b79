"""The verbs ``agssd-site ledger show | plan | verify``."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from agssd_core.accounting import epsilon
from agssd_core.console import new_app, say
from agssd_core.errors import ConfigError, LedgerError
from client.budget import limits_of, stated_delta
from client.ledger import Ledger, LedgerPlace, population_of
from client.ledger_chain import RESERVED, Chain, Head
from client.ledger_plan import Plan, Terms, aligned, plan_for, sampling_rate, table

app = new_app("What private training has spent on this site's patients, and what it may cost.")

SiteArgument = Annotated[Path, typer.Argument(help="The site's folder.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON, for scripts.")]


def register(parent: typer.Typer) -> None:
    """Add the verbs to ``agssd-site``."""
    parent.add_typer(app, name="ledger")


@app.command()
def show(site: SiteArgument, as_json: JsonOption = False) -> None:
    """Show what each run has spent and what is left of the site's own budget.

    Example: agssd-site ledger show site
    """
    ledger = _ledger(site)
    chain = ledger.read()
    delta = stated_delta(site, "{}")
    rows = _by_run(chain, delta)
    total = epsilon(chain.history(), delta=delta)
    budget = next((limit.epsilon for limit in limits_of(site, "{}")), None)
    facts = {
        "population": ledger.population,
        "delta": delta,
        "epsilon": total,
        "budget": budget,
        "open": chain.open_reservations(),
        "head": _text(chain.head),
    }
    if as_json:
        names = ("run", "rounds", "steps", "epsilon")
        runs = [dict(zip(names, (r, n, s, e), strict=True)) for r, n, s, e in rows]
        say(json.dumps({**facts, "runs": runs}))
        return
    if not rows:
        say("nothing was spent: this site has not trained under privacy")
        return
    shown = [("run", "rounds", "steps", "epsilon alone")]
    shown += [(run, str(rounds), str(steps), f"{cost:.3f}") for run, rounds, steps, cost in rows]
    for line in aligned(shown):
        say(line)
    say(f"spent on population {ledger.population}: epsilon {total:.3f} at delta {delta:g}")
    say(_left(total, budget))
    if chain.open_reservations():
        say(f"{chain.open_reservations()} reserved round(s) were never finished; they count.")
    say(f"head {_text(chain.head)}")


@app.command()
def verify(
    site: SiteArgument,
    head: Annotated[
        str,
        typer.Option(help="SEQUENCE:DIGEST that the server holds; it must lie in the ledger."),
    ] = "",
) -> None:
    """Check every entry, the chain and the signatures; exit code 2 when something does not hold.

    Example: agssd-site ledger verify site --head 12:5f77...
    """
    chain = _ledger(site).read()
    if head:
        chain.require(_head(head), by="whoever gave this head")
    if chain.torn:
        say(f"{len(chain.torn)} byte(s) of an entry that a killed process left; it spent nothing")
    said = "; the given head lies in it" if head else ""
    say(f"{len(chain.entries)} entries hold{said}. head {_text(chain.head)}")


@app.command()
def plan(  # noqa: PLR0913 - every option is one number of the plan
    site: Annotated[
        Path | None, typer.Argument(help="Count what was spent on this site's patients.")
    ] = None,
    sigma: Annotated[float | None, typer.Option(help="Noise multiplier.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of a round.")] = 1,
    rate: Annotated[float | None, typer.Option(help="Chance of a patient to be drawn.")] = None,
    patients: Annotated[int | None, typer.Option(min=1, help="Patients of the site.")] = None,
    batch: Annotated[float | None, typer.Option(help="Patients drawn a step, on average.")] = None,
    budget: Annotated[float | None, typer.Option("--epsilon", help="Budget.")] = None,
    delta: Annotated[float | None, typer.Option(help="Below 1 / patients; else 1e-5.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="PNG to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is affordable: of --sigma, --rounds and --epsilon give two, the third is found.

    Example: agssd-site ledger plan --patients 2000 --batch 64 --steps 30 --rounds 100 --epsilon 8
    """
    stated = stated_delta(site, "{}") if site is not None else 1e-5
    terms = Terms(
        sampling_rate(rate, patients, batch),
        steps,
        stated if delta is None else delta,
        _ledger(site).read().history() if site is not None else (),
    )
    if patients is not None and terms.delta * patients >= 1:
        raise ConfigError(
            f"delta {terms.delta:g} is not below 1 / {patients} patients, so it promises nothing. "
            "Lower --delta."
        )
    if budget is None and site is not None:
        budget = next((limit.epsilon for limit in limits_of(site, "{}")), None)
    found = plan_for(terms, sigma=sigma, rounds=rounds, budget=budget)
    if as_json:
        say(json.dumps(_facts(found)))
    else:
        _say_plan(found)
    if out is not None:
        from client.ledger_figure import draw_plan

        draw_plan(found, out)
        say(str(out))


def _say_plan(found: Plan) -> None:
    terms = found.terms
    say(f"q = {terms.rate:.4g}, {terms.steps} step(s) a round, delta {terms.delta:g}")
    if terms.history:
        before = epsilon(terms.history, delta=terms.delta)
        say(f"spent before on these patients: epsilon {before:.3f}, counted in everything below")
    if found.asked == "rounds" and found.rounds == 0:
        say(f"not one round of noise {found.sigma:.4g} fits into epsilon {found.budget:g}")
    else:
        say(
            f"noise multiplier {found.sigma:.4f} and {found.rounds} round(s) "
            f"({found.rounds * terms.steps} steps): epsilon {found.epsilon:.3f}"
        )
    if found.budget is not None and found.epsilon > found.budget:
        say(f"that is above the budget of {found.budget:g}")
    say("")
    for line in aligned(table(found)):
        say(line)


def _facts(found: Plan) -> dict[str, object]:
    terms = found.terms
    return {
        "asked": found.asked,
        "sigma": found.sigma,
        "rounds": found.rounds,
        "steps": found.rounds * terms.steps,
        "rate": terms.rate,
        "delta": terms.delta,
        "epsilon": found.epsilon,
        "budget": found.budget,
        "spent": epsilon(terms.history, delta=terms.delta),
    }


def _ledger(site: Path) -> Ledger:
    return Ledger(LedgerPlace.of_site(site), site="", population=population_of(site))


def _by_run(chain: Chain, delta: float) -> list[tuple[str, int, int, float]]:
    """Run, reserved rounds, steps, epsilon of the run alone; in order of appearance."""
    runs = dict.fromkeys(entry.run for entry in chain.entries)
    found = []
    for run in runs:
        reserved = [e for e in chain.entries if e.run == run and e.state == RESERVED]
        steps = sum(entry.steps for entry in reserved)
        cost = epsilon(chain.history(run=run), delta=delta)
        found.append((run, len(reserved), steps, cost))
    return found


def _left(total: float, budget: float | None) -> str:
    if budget is None:
        return "this site sets no budget of its own; write one into policy.yaml"
    return f"budget of this site: epsilon {budget:g}, of which {max(budget - total, 0):.3f} is left"


def _text(head: Head) -> str:
    return f"{head[0]}:{head[1]}"


def _head(text: str) -> Head:
    match = re.fullmatch(r"(\d{1,12}):([0-9a-f]{64})", text.strip().lower())
    if match is None:
        raise LedgerError(
            "--head is not SEQUENCE:DIGEST with 64 hexadecimal digits. Copy it from the server's "
            "privacy report."
        )
    return int(match[1]), match[2]
