"""``agssd-server rounds | pause | resume | stop | page``: look at a run, and steer it."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from agssd_core.console import say, stdout
from agssd_core.errors import ConfigError
from server.cohorts import run_folders
from server.control import set_state
from server.live_page import live_cohorts, live_page
from server.outcome import RoundOutcome, outcomes_of
from server.run_record import METRICS_FILE
from server.store import RunStore

RunArgument = Annotated[Path, typer.Argument(help="The run's folder.", show_default=False)]
_STEPS = {"idle": "waiting", "ordered": "at work", "admitted": "answered", "refused": "refused"}
_LOOK_S = 1.0


def rounds(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Show who is on line and in which step, until stopped.")
    ] = False,
) -> None:
    """List the rounds of a run, cohort by cohort: who was merged, who was refused and why.

    Example: agssd-server rounds runs/demo --live
    """
    if live and as_json:
        say(json.dumps(live_cohorts(run)))
    elif live:
        _look_on(run)
    else:
        require_rounds(run)
        for folder in run_folders(run).values():
            for outcome in outcomes_of(RunStore(folder).metrics.rows(), rounds=0, first=0):
                say(json.dumps(_row(outcome))) if as_json else say_round(outcome)


def pause(run: RunArgument) -> None:
    """Let the round under way close, then wait until `resume`.

    Example: agssd-server pause runs/demo
    """
    set_state(run_folders(run).values(), "pause")
    say("the run pauses when its round closes; `agssd-server resume` goes on")


def resume(run: RunArgument) -> None:
    """Go on after `pause`.

    Example: agssd-server resume runs/demo
    """
    set_state(run_folders(run).values(), "go")
    say("the run goes on")


def stop(run: RunArgument) -> None:
    """Let the round under way close, then end the run; `serve` goes on from there.

    Example: agssd-server stop runs/demo
    """
    set_state(run_folders(run).values(), "stop")
    say("the run ends when its round closes; `agssd-server serve` goes on from there")


def page(
    run: RunArgument,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 0,
) -> None:
    """Serve the run's live page on 127.0.0.1 until stopped; `serve` does so by itself.

    Example: agssd-server page runs/demo --port 8090
    """
    if not any((folder / "checkpoints").is_dir() for folder in run_folders(run).values()):
        raise ConfigError(f"{run} holds no run. Name a folder under runs/.")
    with live_page(run, port=port) as address:
        say(f"{address} (interrupt to stop)")
        while True:
            time.sleep(3600)


def require_rounds(run: Path) -> None:
    """Check that a folder is a run's with closed rounds.

    Raises:
        ConfigError: it is not.
    """
    if not any((folder / METRICS_FILE).is_file() for folder in run_folders(run).values()):
        raise ConfigError(f"{run} holds no run with closed rounds. Name a folder under runs/.")


def say_round(outcome: RoundOutcome) -> None:
    """One line of a closed round."""
    what = "merged" if outcome.merged else "weights unchanged"
    refused = "".join(f"; {site}: {why}" for site, why in sorted(outcome.refusals.items()))
    sites = ", ".join(outcome.sites) or "no site"
    say(
        f"{outcome.cohort} round {outcome.round}: {what} ({sites}{refused}) in "
        f"{outcome.seconds:.1f} s"
    )


def _row(outcome: RoundOutcome) -> dict[str, Any]:
    return {
        "cohort": outcome.cohort,
        "round": outcome.round,
        "merged": outcome.merged,
        "sites": outcome.sites,
        "refusals": dict(outcome.refusals),
    }


def _look_on(run: Path) -> None:
    if not live_cohorts(run):
        raise ConfigError(f"{run} has no live.json yet. Name a run that `serve` has started.")
    with Live(_tables(run), console=stdout, refresh_per_second=2) as shown:
        while True:
            time.sleep(_LOOK_S)
            shown.update(_tables(run))


def _tables(run: Path) -> Table:
    whole = Table.grid(padding=(0, 0, 1, 0))
    for cohort in live_cohorts(run):
        number = f"round {cohort['round'] + 1} of {cohort['rounds']}"
        table = Table(title=f"{cohort['cohort']}: {cohort['stage']}, {number}")
        for name in ("site", "on line", "step", "last seen", "up", "down", "rounds", "refusals"):
            table.add_column(name)
        for name, site in cohort["sites"].items():
            reasons = f"{site['refusals']}" + (f" ({site['reason']})" if site["reason"] else "")
            table.add_row(
                name,
                "yes" if site["online"] else "no",
                _STEPS.get(site["step"], site["step"]),
                _ago(site["last_seen"]),
                f"{site['bytes_up'] / 1e6:.1f} MB",
                f"{site['bytes_down'] / 1e6:.1f} MB",
                str(site["rounds"]),
                reasons,
            )
        whole.add_row(table)
    return whole


def _ago(moment: str) -> str:
    if not moment:
        return "never"
    return f"{(datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds():.0f} s ago"
