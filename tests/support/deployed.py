"""Real processes of a federation: commands, enrolled sites, and an end to all of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from typer.testing import CliRunner

from client.cli import app as site_app
from server.cli import app as server_app

BIN = Path(sys.executable).parent
# Runs in every Python process of a site before our code.
_HOOK = """
import importlib.util
import sys

class Changed:
    def find_spec(self, name, path, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            exec({change!r}, {{"module": module}})

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Changed())
"""


def do(app, *arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def provisioned(folder, sites, port):
    """A federation whose sites are enrolled, all by commands."""
    plan = {
        "name": "trial",
        "server": {"host": "localhost", "port": port},
        "sites": [{"name": name, "cohorts": ["ct-mr"]} for name in sites],
    }
    file, federation = folder / "federation.yaml", folder / "federation"
    file.write_text(yaml.safe_dump(plan))
    do(server_app, "provision", file, "--out", federation)
    for name, site in sites.items():
        do(site_app, "enrol", federation / "kits" / f"{name}.zip", "--site", site)
        answer = folder / f"{name}.json"
        request = site / "keys" / "request.json"
        do(server_app, "admit", request, "--federation", federation, "--answer", answer)
        do(site_app, "enrol", "--site", site, "--answer", answer)
        # The test's steps are fewer and smaller than a hospital should allow.
        (site / "policy.yaml").write_text("work: {least_steps: 1, least_batch: 1, least_images: 1}")
    return federation


def changed_environment(folder, module, change):
    """Environment whose Python processes run ``change`` on a ``module`` as soon as it is loaded."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_HOOK.format(module=module, change=change))
    places = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(places)}


def wait(condition, seconds):
    """What the condition gave last: something true, or whatever it was when time was over."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


@contextlib.contextmanager
def all_started(commands, environment=None):
    """Several processes by the file of their output; all are told to end before any is awaited."""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(started(log, *command, environment=environment))
            for log, command in commands.items()
        ]
        try:
            yield processes
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)  # does nothing to one that was waited for


@contextlib.contextmanager
def started(log, *command, environment=None):
    """A process in a session of its own, of which nothing is left at the end."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
