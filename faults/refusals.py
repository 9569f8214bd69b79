"""Row 8: another version, plan, form or application: refused before anything is trained."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from flwr.app import RecordDict
from typer.testing import CliRunner

from agssd_core.console import EXIT_USER_ERROR
from agssd_core.errors import OrderRefusedError
from agssd_core.protocol import PROTOCOL_VERSION
from client import launcher
from client.pulling import Door, guarded
from client.site import Site
from faults.suite import Fault, Try
from faults.toys import quick_disk, shares
from server.cli import app as server_app
from simulation.grid import Fault as GridFault
from tests.support.federated import federated_config, started_run
from tests.support.hostile import BAD
from tests.support.orders import order_for
from tests.support.toy import Hospital, ToyBench, toy_weights

Case = Callable[[Path], Try]


def _order(reason: str, **changes: Any) -> Case:
    """A site that is given such an order."""

    def case(folder: Path) -> Try:
        (folder / "facts.json").write_text('{"patients": 7}')
        site, weights = Site(folder, "north", ToyBench()), toy_weights()
        try:
            site.train_round(order_for(weights, **changes), weights)
        except OrderRefusedError as error:
            good = error.reason == reason and site.workbench.trainers == []
            return Try(good, f"{error.reason}: {error}")
        return Try(passed=False, detail="it was trained")

    return case


def _update(case: str) -> Case:
    """A server that is given such an update."""

    def run(folder: Path) -> Try:
        tamper, reason = BAD[case]
        one = Hospital(folder / "x", rounds=1)
        one.run(
            lambda name, group: GridFault(tamper=tamper if (name, group) == ("b", "0") else None)
        )
        good = one.reasons() == [(0, "b", reason)] and shares(one, 0) == {"a", "c"}
        return Try(good, f"{one.reasons()}")

    return run


def other_plan(folder: Path) -> Try:
    """``agssd-server serve`` with another plan than the run's: exit code and words."""
    config = federated_config(folder / "runs")
    started_run(config, folder / "runs" / "run")
    content = config.model_dump(mode="json")
    content["federation"]["steps_per_round"] += 1
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    done = CliRunner().invoke(server_app, ["serve", str(file), "--loopback"])
    said = " ".join(done.output.split())
    good = done.exit_code == EXIT_USER_ERROR and "federation.steps_per_round" in said
    return Try(good and "run's own configuration" in said, f"{done.exit_code}: {said}")


def other_application(_folder: Path) -> Try:
    """A bundle that is not on the site's list is refused before it is opened."""
    opened: list[Any] = []
    replies: list[Any] = []
    message = launcher.local_message("train", RecordDict())

    def pull(*, receive: Any, get_fab: Any, **_others: Any) -> Any:
        receive()
        opened.append(get_fab(hashlib.sha256(b"another").hexdigest(), 1))

    engine = SimpleNamespace(_insert_message=lambda reply, *_: replies.append(reply))
    let_in = guarded(pull, engine, Door(frozenset([launcher.application_digest()])))
    fab = SimpleNamespace(content=b"another")
    with contextlib.suppress(AttributeError):
        let_in(
            receive=lambda: (message, None), get_fab=lambda *_: fab, state=None, object_store=None
        )
    said = [reply.error.reason for reply in replies]
    return Try(not opened and said == ["declined-policy-code"], f"opened {opened}, said {said}")


CASES: dict[str, Case] = {
    "order of another protocol version": _order("protocol", protocol=PROTOCOL_VERSION + 1),
    "order against its own plan's steps": _order("plan", steps=3),
    "order whose plan is not valid here": _order("plan", config_text='{"agsd": {}}'),
    "update of another protocol version": _update("version"),
    "run resumed with another plan": other_plan,
    "application that is not allowed": other_application,
}


def mismatches(folder: Path, tries: int) -> Iterator[Try]:
    """Each case in turn."""
    for number in range(tries):
        name = list(CASES)[number % len(CASES)]
        place = folder / str(number)
        place.mkdir()
        with quick_disk():
            one = CASES[name](place)
        yield Try(one.passed, f"{name}: {one.detail}")


FAULTS = [
    Fault(8, "version, plan or application mismatch", mismatches, len(CASES), short=len(CASES))
]
