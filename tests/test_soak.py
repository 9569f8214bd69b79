"""Thirty hours of a federation of five in accelerated time: joins, crashes, restarts, slow links.

Orders and updates are signed and both sides keep journals. At the end the journals hold, every
update that was acknowledged is in a merge once, and memory has stopped growing.
"""

import gc
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from agssd_core.journal import Journal, entries_of, verify_journal
from agssd_core.journal_heads import heard, known_heads, remember, told
from client.app import make_app
from client.site import Site
from server.chronicle import Chronicle
from simulation.grid import Fault, VirtualTime
from tests.support.signing import SignedHospital

SITES = (("a", 3), ("b", 2), ("c", 4), ("d", 6), ("e", 1))
HOURS = 30
DEADLINE_S = 300.0
ROUNDS = 180
ROUND_S = HOURS * 3600 / ROUNDS


class Recorder:
    """A site's journal without the files of an enrolment."""

    def __init__(self, folder, name, key):
        folder.mkdir()
        self.folder, self.journal = folder, Journal(folder, key, owner=name)

    def append(self, kind, facts):
        self.journal.append(kind, facts)

    def head(self):
        return told(self.journal.head())

    def hear(self, head):
        remember(self.folder, "coordinator", heard(head))


class Weather:
    """What befalls each site and round, drawn once from a seed."""

    def __init__(self, names, seed):
        self.rng = np.random.default_rng(seed)
        self.joined = {name: int(self.rng.integers(0, 40)) for name in names}
        self.joined[names[0]] = 0
        self.told = Counter()

    def __call__(self, name, group):
        if group == "hello" or not group.isdecimal():
            return Fault()
        if int(group) < self.joined[name]:
            return Fault(offline=True)
        kind = self.rng.choice(
            ["fine", "slow", "late", "crash", "lost", "twice", "upload"],
            p=[0.72, 0.1, 0.04, 0.05, 0.04, 0.03, 0.02],
        )
        self.told[kind] += 1
        return {
            "fine": Fault(),
            "slow": Fault(delay_s=float(self.rng.uniform(1, DEADLINE_S * 0.9))),
            "late": Fault(delay_s=float(self.rng.uniform(DEADLINE_S * 1.1, DEADLINE_S * 3))),
            "crash": Fault(offline=True),
            "lost": Fault(lost_reply=True),
            "twice": Fault(twice=True),
            "upload": Fault(upload_fails=True),
        }[str(kind)]


class Federation(SignedHospital):
    """Sites restart now and then: a fresh app has no warm trainer."""

    def __init__(self, folder):
        super().__init__(
            folder, SITES, rounds=ROUNDS, deadline_s=DEADLINE_S, min_sites=1, poll_s=10.0
        )
        self.restarts = np.random.default_rng(7)
        (folder / "server").mkdir()
        self.chronicle = Chronicle(Journal(folder / "server", self.server_key, owner="toy"))
        self.recorders = {
            name: Recorder(folder / f"journal-{name}", name, each.signing_key)
            for name, each in self.identities.items()
        }

    def app(self):
        opened = {}

        def open_site(node_config):
            name = node_config["name"]
            if name not in opened or self.restarts.random() < 0.05:
                opened[name] = Site(
                    Path(node_config["site"]),
                    name,
                    self.bench,
                    self.identities[name],
                    self.recorders[name],
                )
            self.bench.trainers.clear()
            return opened[name]

        return make_app(open_site)


def soak(folder):
    federation = Federation(folder)
    weather, memory, timer = Weather(sorted(federation.sites), seed=11), [], VirtualTime()
    process = psutil.Process()

    def closed(outcome):
        timer.sleep(max(0.0, (outcome.round + 1) * ROUND_S - timer.now))
        gc.collect()
        memory.append(process.memory_info().rss)

    grid = federation.grid(weather, timer=timer)
    federation.run(grid=grid, on_round=closed, chronicle=federation.chronicle)
    return federation, weather, memory, timer


def updates_of(journal):
    return [entry.facts for entry in entries_of(journal) if entry.kind == "update"]


@pytest.mark.timeout(1200)
def test_thirty_hours_of_every_kind_of_weather(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    federation, weather, memory, timer = soak(tmp_path / "x")
    assert timer.now >= HOURS * 3600
    assert len(federation.rows("merge")) == ROUNDS
    assert min(weather.told.values()) >= 5, weather.told
    assert max(weather.joined.values()) > 10
    journals_hold_and_know_each_others_heads(federation)
    every_acknowledged_update_is_merged_once(federation)
    what_was_admitted_is_what_was_sent(federation)
    memory_does_not_grow(memory)


def journals_hold_and_know_each_others_heads(federation):
    server = federation.chronicle.journal.folder
    verify_journal(server, federation.server_key.public)
    for name, recorder in federation.recorders.items():
        key = federation.identities[name].signing_key.public
        verify_journal(recorder.folder, key, expected_head=known_heads(server)[name])
        heads = known_heads(recorder.folder)
        verify_journal(server, federation.server_key.public, expected_head=heads["coordinator"])


def every_acknowledged_update_is_merged_once(federation):
    admitted = Counter(
        (facts["round"], facts["site"]) for facts in updates_of(federation.chronicle.journal.folder)
    )
    merged = Counter((row["round"], row["site"]) for row in federation.rows("site"))
    assert admitted == merged
    assert set(merged.values()) == {1}
    assert len(merged) > ROUNDS


def what_was_admitted_is_what_was_sent(federation):
    for name, recorder in federation.recorders.items():
        sent = {(f["round"], f["weights"]) for f in updates_of(recorder.folder)}
        taken = {
            (f["round"], f["weights"])
            for f in updates_of(federation.chronicle.journal.folder)
            if f["site"] == name
        }
        assert taken <= sent


def memory_does_not_grow(memory):
    late = np.array(memory[ROUNDS // 2 :], dtype=np.float64)
    rounds = np.arange(len(late))
    line = np.polyfit(rounds, late, 1)
    noise = np.std(late - np.polyval(line, rounds))
    grown = line[0] * len(late)
    assert grown < 3 * noise + 0.02 * late.mean(), (grown, noise, late.mean())


class DoneError(Exception):
    """Ends a run after a round."""


def test_a_rolled_back_journal_of_a_site_costs_it_its_round(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    federation = Federation(tmp_path / "x")
    victim = federation.recorders["b"]
    kept = tmp_path / "kept"

    def closed(outcome):
        if outcome.round == 1:
            shutil.copytree(victim.folder, kept)
        if outcome.round == 3:
            shutil.rmtree(victim.folder)
            shutil.copytree(kept, victim.folder)
            victim.journal = Journal(
                victim.folder, federation.identities["b"].signing_key, owner="b"
            )
        if outcome.round == 4:
            raise DoneError

    with pytest.raises(DoneError):
        federation.run(on_round=closed, chronicle=federation.chronicle)
    assert (4, "b", "journal") in federation.reasons()
