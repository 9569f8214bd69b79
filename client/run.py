"""``agssd-site run``: a SuperNode for one site, in the foreground, ended with all its children."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tomli_w

from agssd_core.config.node import name_problem
from agssd_core.data.catalogue import open_catalogue
from agssd_core.errors import ConfigError, EngineError
from agssd_core.processes import (
    LOOPBACK,
    Child,
    engine_environment,
    free_port,
    is_healthy,
    stopping_on_terminate,
)
from agssd_core.weights import write_text

_LOCAL_NAMES = (LOOPBACK, "localhost")


def run_site(
    site: Path, *, server: str, name: str = "", threads: int = 1, say: Callable[[str], None]
) -> None:
    """Connect a site to a server on this machine and answer its orders until interrupted.

    Args:
        site: folder made by ``agssd-site index`` and ``agssd-site prepare``.
        server: ``127.0.0.1:PORT``.
        name: enrolled name; the folder's by default.
        threads: CPU threads of the numerical libraries; training takes them from the order.
        say: where a line for the operator goes.

    Raises:
        ConfigError: the server is not on this machine, or the name is none.
        CatalogueError: the folder is not a site.
        EngineError: the node ended by itself.
    """
    port = _loopback_port(server)
    name = name or site.resolve().name
    if problem := name_problem(name):
        raise ConfigError(f"{problem} Use --name.")
    catalogue = open_catalogue(site)
    counts = [f"{len(catalogue.patients_of(each))} {each}" for each in catalogue.cohorts]
    patients = f"patients: {', '.join(counts) or 'none'}"
    home = Path(tempfile.mkdtemp(prefix="agssd-site-"))
    log_file = site / "federation" / "node.log"
    settings = home / "node.toml"
    command = ["flower-supernode", "--insecure", "--superlink", server]
    command += ["--host", LOOPBACK, "--port", str(free_port()), "--node-config", str(settings)]
    environment = engine_environment(home, threads=threads)
    try:
        write_text(
            settings, tomli_w.dumps({"site": str(site.resolve()), "name": name}), private=True
        )
        with (
            stopping_on_terminate(),
            Child(command, environment=environment, log_file=log_file) as node,
        ):
            say(f"site {name} ({patients}) answers {server}; interrupt to stop")
            if not is_healthy(port):
                say(
                    f"nobody serves {server} yet; the site keeps trying. Start `agssd-server "
                    "serve`, or compare its port."
                )
            while node.poll() is None:
                time.sleep(0.5)
            raise EngineError(
                f"the node ended with code {node.process.returncode}. See federation/node.log in "
                "the site's folder; is the server running?"
            )
    except KeyboardInterrupt:
        say("stopped; the site's state is on its disk")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _loopback_port(server: str) -> int:
    host, _, port = server.rpartition(":")
    if host not in _LOCAL_NAMES or not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ConfigError(
            f"--server {server} is not a port of this machine. Without certificates a site "
            "connects to 127.0.0.1:PORT only."
        )
    return int(port)
