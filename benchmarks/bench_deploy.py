"""A trivial round over the real deployment: our launcher and trainer against Flower's own engine.

Three enrolled sites on one machine, TLS, nginx, signed messages, one optimiser step of the tiny
preset. Both answer with the same app; Flower's engine starts a process for every message, which
imports everything and builds the model anew. First rounds, in which nothing is warm, are left out.

    python -m benchmarks.bench_deploy [--quick]
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import yaml

from agssd_core.processes import LOOPBACK, engine_environment, free_port
from client.connection import ca_file, load_connection, node_key_file, signing_key_file

SITES = ("north", "coast", "valley")
MUST = 0.5
CONFIG = Path(__file__).parents[1] / "configs" / "deploy-demo.yaml"
BIN = Path(sys.executable).parent
ROUND = re.compile(r"round (\d+): merged .* in ([0-9.]+) s")


def main() -> int:
    """Print the seconds of both and their ratio; 1 when the must is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, once each")
    quick = parser.parse_args().quick
    if shutil.which("nginx") is None:
        print("nginx is not installed; nothing was measured")
        return 0
    seconds: dict[str, list[float]] = {"ours": [], "stock": []}
    with tempfile.TemporaryDirectory(prefix="agssd-bench-") as name:
        federation = Federation(Path(name), rounds=3 if quick else 6)
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
        members = [{"name": name, "cohorts": ["ct-mr"]} for name in SITES]
        plan = {
            "name": "bench",
            "server": {"host": "localhost", "port": self.port},
            "sites": members,
        }
        (folder / "federation.yaml").write_text(yaml.safe_dump(plan))
        os.environ["AGSSD_CA_PASSPHRASE"] = "of a benchmark only"  # noqa: S105 - no secret
        self.keys = folder / "federation"
        _do("agssd-server", "provision", folder / "federation.yaml", "--out", self.keys)
        _do("agssd-sim", "phantoms", self.config, "--out", folder / "scans")
        for name in SITES:
            self._enrol(name)

    def _enrol(self, name: str) -> None:
        site, answer = self.folder / name, self.folder / f"{name}.json"
        modality = "CT" if name == "north" else "MR"
        _do("agssd-site", "index", self.folder / "scans" / name, "--modality", modality, "-o", site)
        _do("agssd-site", "prepare", site, "--config", self.config)
        _do("agssd-site", "enrol", self.keys / "kits" / f"{name}.zip", "--site", site)
        request = site / "keys" / "request.json"
        _do("agssd-server", "admit", request, "-f", self.keys, "--answer", answer)
        _do("agssd-site", "enrol", "--answer", answer, "--site", site)
        least = {"work": {"least_steps": 1, "least_batch": 1, "least_images": 1}}
        (site / "policy.yaml").write_text(json.dumps(least))

    def serve(self, kind: str, name: str) -> list[float]:
        """Seconds of every round but the first."""
        settings = [f"name={name}", f"output={self.folder / 'runs'}"]
        _do("agssd-sim", "init", self.config, *settings)
        server = [BIN / "agssd-server", "serve", self.config, *settings, "-f", self.keys]
        log = self.folder / f"{name}.log"
        with ExitStack() as stack:
            serving = stack.enter_context(
                _running(log, [*server, "--listen", f"{LOOPBACK}:{self.port}"])
            )
            time.sleep(2)
            for site in SITES:
                command = self._ours(site) if kind == "ours" else self._stock(site)
                stack.enter_context(_running(self.folder / f"{name}-{site}.log", command))
            if serving.wait(1800) != 0:
                raise SystemExit(log.read_text(encoding="utf-8"))
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


def _do(*command: object) -> None:
    subprocess.run(
        [str(BIN / str(command[0])), *map(str, command[1:])], check=True, stdout=subprocess.DEVNULL
    )


@contextmanager
def _running(log: Path, command: Sequence[object]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, of which nothing is left at the end."""
    environment = engine_environment(log.with_suffix(".home"), threads=1)
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
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    raise SystemExit(main())
