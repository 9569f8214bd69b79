"""A trivial round over the real deployment: our launcher and trainer against Flower's own engine.

Three enrolled sites on one machine, TLS, nginx, signed messages, one optimiser step of the tiny
preset. Both answer with the same app; Flower's engine starts a process for every message, which
imports everything and builds the model anew. First rounds, in which nothing is warm, are left out.

    python -m benchmarks.bench_deploy [--quick]
"""

import argparse
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import yaml

from agssd_core.processes import LOOPBACK, engine_environment, free_port
from client.cli import app as site_app
from client.connection import ca_file, load_connection, node_key_file, signing_key_file
from simulation.cli import app as sim_app
from tests.support.deployed import BIN, all_started, do, provisioned, started

SITES = ("north", "coast", "valley")
MUST = 0.5
CONFIG = Path(__file__).parents[1] / "configs" / "deploy-demo.yaml"
BEGAN = time.monotonic()
ROUND = re.compile(r"round (\d+): merged .* in ([0-9.]+) s")


def main() -> int:
    """Print the seconds of both and their ratio; 1 when the must is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one turn instead of two")
    quick = parser.parse_args().quick
    if shutil.which("nginx") is None:
        print("nginx is not installed; nothing was measured")
        return 0
    seconds: dict[str, list[float]] = {"ours": [], "stock": []}
    with tempfile.TemporaryDirectory(prefix="agssd-bench-") as name:
        federation = Federation(Path(name), rounds=3)
        for turn in range(1 if quick else 2):
            for kind in seconds:
                seconds[kind] += federation.serve(kind, f"{kind}-{turn}")
    ours, stock = (statistics.median(seconds[kind]) for kind in ("ours", "stock"))
    print(f"rounds in seconds, ours: {seconds['ours']}")
    print(f"rounds in seconds, Flower's engine: {seconds['stock']}")
    met = ours <= MUST * stock
    print(
        f"trivial round, three warm sites: {ours:.2f} s against {stock:.2f} s, "
        f"{ours / stock:.2f} x (must at most {MUST:g}): {'met' if met else 'MISSED'}"
    )
    return 0 if met else 1


class Federation:
    """Keys, certificates and three prepared phantom sites below a folder."""

    def __init__(self, folder: Path, *, rounds: int) -> None:
        self.folder, self.port = folder, free_port()
        content = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        content["federation"] |= {"rounds": rounds, "steps_per_round": 1}
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(content))
        os.environ["AGSSD_CA_PASSPHRASE"] = "of a benchmark only"  # noqa: S105 - no secret
        do(sim_app, "phantoms", self.config, "--out", folder / "scans")
        sites = {name: folder / name for name in SITES}
        for name, site in sites.items():
            modality = "CT" if name == "north" else "MR"
            scans = folder / "scans" / name
            do(site_app, "index", scans, "--modality", modality, "-o", site)
            do(site_app, "prepare", site, "--config", self.config)
        self.keys = provisioned(folder, sites, self.port)
        _say("three sites are enrolled")

    def serve(self, kind: str, name: str) -> list[float]:
        """Seconds of every round but the first."""
        settings = [f"name={name}", f"output={self.folder / 'runs'}"]
        do(sim_app, "init", self.config, *settings)
        server = [BIN / "agssd-server", "serve", self.config, *settings, "-f", self.keys]
        log = self.folder / f"{name}.log"
        environment = engine_environment(self.folder / f"{name}.home", threads=1)
        commands = {
            self.folder / f"{name}-{site}.log": self._ours(site)
            if kind == "ours"
            else self._stock(site)
            for site in SITES
        }
        with started(
            log, *server, "--listen", f"{LOOPBACK}:{self.port}", environment=environment
        ) as serving:
            time.sleep(2)
            with all_started(commands, environment):
                if serving.wait(1800) != 0:
                    raise SystemExit(log.read_text(encoding="utf-8"))
        _say(f"{name} is done")
        found = ROUND.findall(log.read_text(encoding="utf-8"))
        return [float(seconds) for number, seconds in found if int(number) > 0]

    def _ours(self, site: str) -> list[object]:
        return [BIN / "agssd-site", "run", self.folder / site]

    def _stock(self, site: str) -> list[object]:
        place = self.folder / site
        connection = load_connection(place)
        own = {
            "site": str(place),
            "name": site,
            "server-key": connection.server_key,
            "signing-key": str(signing_key_file(place, connection.key_id)),
        }
        command = [BIN / "flower-supernode", "--root-certificates", ca_file(place)]
        command += ["--superlink", connection.server, "--port", free_port(), "--host", LOOPBACK]
        command += ["--auth-supernode-private-key", node_key_file(place, connection.key_id)]
        text = " ".join(f'{key}="{value}"' for key, value in own.items())
        return [*command, "--node-config", text]


def _say(what: str) -> None:
    print(f"{time.monotonic() - BEGAN:.0f} s: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
