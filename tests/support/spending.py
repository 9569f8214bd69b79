"""A private site that is killed at any moment, and what its ledger must say then."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from agssd_core.weights import save_weights
from client.ledger import Ledger, LedgerPlace, population_of
from client.ledger_chain import RESERVED
from client.memory import RunMemory
from tests.support.private_toy import private_site
from tests.support.toy import toy_weights

ROOT = Path(__file__).parents[2]


def chain_of(folder, place=None):
    place = place or LedgerPlace.of_site(folder)
    return Ledger(place, site="north", population=population_of(folder)).read()


def kill_spender(folder, times, seed):
    """Let a site train in a real process and kill it with -9, again and again."""
    private_site(folder)
    save_weights(folder / "base.safetensors", toy_weights())
    command = [sys.executable, "-m", "tests.support.private_toy", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    moments, pipe = random.Random(seed), subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True
    ) as spender:
        round_s = float(spender.stdout.readline())
        for _ in range(times):
            spender.stdin.write("again\n")
            spender.stdin.flush()
            child = int(spender.stdout.readline())
            time.sleep(moments.uniform(0.0, 4 * round_s))
            os.kill(child, signal.SIGKILL)
            assert int(spender.stdout.readline()) == -signal.SIGKILL  # it was training until then
            require_nothing_undercounted(folder)
            yield child


def require_nothing_undercounted(folder):
    chain = chain_of(folder)
    file = folder / "witness"
    trained = file.read_text().split() if file.is_file() else []
    paid = [entry.round for entry in chain.entries if entry.state == RESERVED]
    # Every round that was begun, in its order: each time it was begun it was paid before.
    waiting = list(paid)
    for number in map(int, trained):
        assert number in waiting, f"round {number} was trained and not paid"
        waiting.remove(number)
    last = RunMemory.of(folder, "run-1").last()
    if last is not None:
        committed = {entry.round for entry in chain.entries if entry.state == "committed"}
        assert set(range(last.round)) <= committed | set(paid)
        assert last.round in paid
