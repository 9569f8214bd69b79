"""Ends of processes at any point of a round, at server and sites alike."""

import sys

import client.memory
import client.site
from tests.support import toy


class Killed(BaseException):
    """A process that ends here; no handler of ours may catch it."""


def watch_rounds(monkeypatch, killer):
    """Let ``killer`` see every call on the way of a round, at server and sites alike."""
    spots = [
        (toy.ToyTrainer, "train_steps"),
        (toy.ToyTrainer, "save_state"),
        (client.memory.RunMemory, "begin"),
        (client.memory.RunMemory, "commit"),
        (client.memory, "save_weights"),
        (client.memory, "write_text"),
        (client.site, "release"),
        (sys.modules["server.spool"].RoundSpool, "add"),
        (sys.modules["server.spool"].RoundSpool, "clear"),
        (sys.modules["server.metrics_log"].MetricsLog, "append"),
        (sys.modules["server.store"].RunStore, "save_round"),
        (sys.modules["server.rounds"], "merge_round"),
    ]
    for owner, name in spots:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name), killer))


def watched(original, killer):
    def call(*args, **kwargs):
        killer()
        result = original(*args, **kwargs)
        killer()
        return result

    return call


class Killer:
    """Raises at the n-th point; later ones live."""

    def __init__(self, at):
        self.at, self.seen = at, 0

    def __call__(self):
        self.seen += 1
        if self.seen == self.at:
            raise Killed
