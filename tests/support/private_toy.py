"""A toy trainer that pays before every round, and a child that trains until it is killed."""

import os
import sys
import time
from pathlib import Path

import numpy as np

from agssd_core.config import parse_config
from agssd_core.data.deidentify import ensure_secret
from agssd_core.weights import load_weights
from client.memory import RunMemory
from client.purse import PaysFirst
from client.site import Site
from tests.support.orders import order_for
from tests.support.toy import ToyBench, ToyTrainer

SIGMA, RATE, STEPS = 1.0, 0.1, 2
ROUNDS = 100_000


class PrivateToyTrainer(ToyTrainer):
    """Fresh noise in every round, and a witness of every round that was really trained."""

    spend, witness = None, None

    def spend_through(self, spend):
        self.spend = spend

    def train_steps(self, first_step, steps, total_steps):
        self.spend(SIGMA, RATE, steps)
        if self.witness is not None:
            descriptor = os.open(self.witness, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, f"{first_step // steps}\n".encode())
            os.close(descriptor)
        metrics = super().train_steps(first_step, steps, total_steps)
        noise = np.random.default_rng()
        for name, array in self.weights.items():
            if name.startswith("student/"):
                array += noise.standard_normal(array.shape).astype(np.float32)
        return metrics | {"private": 1.0}


class PrivateBench(ToyBench):
    def __init__(self, witness=None):
        super().__init__()
        self.witness = witness

    def trainer(self, _folder, config, *, site):
        trainer = PrivateToyTrainer(config, site=site)
        trainer.witness = self.witness
        assert isinstance(trainer, PaysFirst)
        self.trainers.append(trainer)
        return trainer


def private_site(folder, *, ledger="site", witness=None):
    """A site with a secret and seven patients."""
    folder.mkdir(parents=True, exist_ok=True)
    ensure_secret(folder)
    (folder / "facts.json").write_text('{"patients": 7}')
    return Site(folder, "north", PrivateBench(witness), ledger=ledger)


def endless():
    """A plan that no budget ends."""
    return parse_config(
        {
            "preset": "tiny",
            "federation": {"rounds": ROUNDS, "steps_per_round": STEPS},
            "privacy": {"epsilon_budget": 0},
        }
    )


def train_until_killed(folder):
    """Take up the rounds where the site's memory ends, and go on for ever."""
    site = private_site(folder, witness=folder / "witness")
    base = load_weights(folder / "base.safetensors")
    config = endless()
    last = RunMemory.of(folder, "run-1").last()
    for number in range(0 if last is None else last.round + 1, ROUNDS):
        site.train_round(order_for(base, number, config), base)


def main():
    """Say how long a round takes, then fork a child for each line of stdin and say how it ended."""
    folder = Path(sys.argv[1])
    train_once = private_site(folder.with_name("warm-up"))
    base = load_weights(folder / "base.safetensors")
    config = endless()
    train_once.train_round(order_for(base, 0, config), base)
    began = time.monotonic()
    train_once.train_round(order_for(base, 1, config), base)
    os.write(1, f"{time.monotonic() - began}\n".encode())
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            train_until_killed(folder)
        os.write(1, f"{child}\n".encode())
        _, status = os.waitpid(child, 0)
        os.write(1, f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    main()
