"""Toy rounds whose orders and replies travel as differences."""

import json

import numpy as np
import pytest

from simulation.grid import Fault

CODED = pytest.mark.parametrize("wire", ["bf16", "int8"])

NEAR = 0.005


def only(site, number, fault):
    """The fault strikes this site's message of this round."""
    return lambda name, group: fault if (name, group) == (site, str(number)) else Fault()


class Ordered:
    """A grid's pushes, by (site, round): the order as it went out."""

    def __init__(self, run, faults=None):
        self.grid = run.grid(faults)
        self.seen = {}
        push, names = self.grid.push_messages, {101 + i: n for i, n in enumerate(sorted(run.sites))}

        def watched(messages):
            (message,) = messages
            if message.metadata.message_type == "train":
                body = json.loads(message.content["header"]["body"])
                key = (names[message.metadata.dst_node_id], message.metadata.group_id)
                self.seen.setdefault(key, []).append(body["wire"])
            return push([message])

        self.grid.push_messages = watched


def distance(one, two):
    """L2 over all arrays."""
    squares = [float(np.sum((one[n].astype(np.float64) - two[n]) ** 2)) for n in one]
    return float(np.sqrt(sum(squares)))
