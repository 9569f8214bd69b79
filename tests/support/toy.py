"""A toy trainer in numpy with all that a round must keep: optimiser moments, teacher, state.

That of ``us`` has no state unless statistics are shared, and statistics of its own that decide the
bits, so that losing them shows.
"""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np

from agssd_core.config import config_from_json, dump_config, parse_config
from agssd_core.training.checkpoint import SiteState, read_site_state, save_site_state
from client.app import make_app
from client.site import Site, SiteFacts
from server.cohorts import cohort_folders, run_cohorts
from server.manifest import RoundRecord
from server.rounds import run_rounds
from server.store import RunStore
from simulation.grid import Fault, InProcessGrid, VirtualTime

__all__ = [
    "BATCH",
    "BOTH",
    "SHARED",
    "Consortium",
    "Hospital",
    "ToyBench",
    "ToyTrainer",
    "VirtualTime",
    "config_from_json",
    "toy_weights",
]

SHAPES = {"encoder.blocks.0.w": (4, 3), "encoder.bias": (3,), "head.w": (3, 5)}
US_SHAPES = {"backbone.layer1.0.w": (3, 4), "backbone.bn1.bias": (4,), "predictor.w": (4, 2)}
RATE, MOMENTUM = 0.1, 0.9
BATCH = {"backbone": {"norm": "batch"}}
SHARED = {"backbone": {"norm": "batch"}, "share_statistics": True}


def toy_weights(seed=0, cohort="ct-mr", *, shared=False):
    rng = np.random.default_rng(seed)
    shapes = US_SHAPES if cohort == "us" else SHAPES
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    weights = {
        f"{group}/{n}": a.copy() for group in ("student", "teacher") for n, a in arrays.items()
    }
    if cohort == "us":
        return weights | (_statistics() if shared else {})
    return weights | {
        "state/centre": np.zeros(5, np.float32),
        "state/density": np.float32(0.5).reshape(()),
    }


def _statistics():
    return {
        "state/statistics.bn1.mean": np.zeros(4, np.float32),
        "state/statistics.bn1.square": np.ones(4, np.float32),
    }


class ToyTrainer:
    """Gradient descent with momentum towards a target that the site's name draws."""

    def __init__(self, config, *, site, fail=None):
        self.config, self.site, self.fail = config, site, fail
        self.weights, self.moments, self.anchor = {}, {}, {}
        self.steps_taken = 0
        self.reset = None
        self.us = config.federation.cohort == "us"
        self.shapes = US_SHAPES if self.us else SHAPES
        batch = self.us and config.anaus.backbone.norm == "batch"
        self.statistics, self.seen = _statistics() if batch else {}, 0

    def load(self, weights):
        self.anchor = {n: a.copy() for n, a in weights.items()}
        kept = self.statistics if self.us else {}
        if self.seen == 0:
            self.statistics = {n: weights.get(n, a).copy() for n, a in kept.items()}
        state = {n for n in weights if n in self.statistics}
        self.weights = {n: a.copy() for n, a in weights.items() if n not in state}

    def shared_weights(self):
        shared = self.statistics if self.config.anaus.share_statistics else {}
        return {n: a.copy() for n, a in {**self.weights, **shared}.items()}

    def train_steps(self, first_step, steps, total_steps):
        if self.fail is not None:
            self.fail(first_step)
        reset = not self.moments and first_step > 0
        loss = 0.0
        for step in range(first_step, first_step + steps):
            loss = self._step(step, total_steps)
        return {"loss": float(loss), "optimiser_reset": float(reset), "learning_rate": RATE}

    def _step(self, step, total):
        rng = np.random.default_rng([step, *self.site.encode()])
        target = (
            np.random.default_rng(sum(self.site.encode())).standard_normal(1).astype(np.float32)
        )
        keep = np.float32(self.config.teacher.momentum_at(step, total))
        loss = 0.0
        for name in self.shapes:
            weight = self.weights[f"student/{name}"]
            noise = np.float32(0.01) * rng.standard_normal(weight.shape).astype(np.float32)
            gradient = weight - target + noise + self._own(name)
            moment = np.float32(MOMENTUM) * self.moments.get(name, np.zeros_like(weight)) + gradient
            self.moments[name] = moment
            self.weights[f"student/{name}"] = weight - np.float32(RATE) * moment
            teacher = self.weights[f"teacher/{name}"]
            self.weights[f"teacher/{name}"] = (
                keep * teacher + (1 - keep) * self.weights[f"student/{name}"]
            )
            loss += float(np.square(weight - target).mean())
        if not self.us:
            self.weights["state/centre"] = np.float32(0.9) * self.weights["state/centre"] + target
        self._look(rng.standard_normal(4).astype(np.float32) + target)
        self.steps_taken += 1
        return loss

    def _own(self, name):
        """What the site's own statistics add to a gradient."""
        mean = self.statistics.get("state/statistics.bn1.mean")
        return np.float32(0) if mean is None or "bn1" not in name else np.float32(0.1) * mean

    def _look(self, batch):
        """Move running statistics by a batch, as BatchNorm does."""
        self.seen += 1
        new = (batch, batch * batch)
        for (name, held), value in zip(sorted(self.statistics.items()), new, strict=False):
            self.statistics[name] = np.float32(0.9) * held + np.float32(0.1) * value

    def save_state(self, folder, stamp):
        arrays = {**self.moments, **self.statistics}
        save_site_state(folder, SiteState(arrays, {"seen": self.seen}), stamp)

    def load_state(self, folder, stamp):
        state = read_site_state(folder, stamp)
        held = {} if state is None else {n: np.array(a) for n, a in state.arrays.items()}
        self.moments = {n: a for n, a in held.items() if n in self.shapes}
        self.statistics |= {n: a for n, a in held.items() if n in self.statistics}
        self.seen = 0 if state is None else state.numbers["seen"]
        return state is not None


class ToyBench:
    """Opens toy trainers; every one is remembered.

    A site's folder holds ``facts.json`` with its patients: a number is those of ``ct-mr``.
    """

    def __init__(self, fail=None):
        self.trainers, self.fail = [], fail

    def facts(self, folder, cohort):
        patients = json.loads((folder / "facts.json").read_text())["patients"]
        counts = patients if isinstance(patients, dict) else {"ct-mr": patients}
        return SiteFacts(counts.get(cohort, 0), counts.get(cohort, 0))

    def trainer(self, _folder, config, *, site):
        hook = None if self.fail is None else (lambda step: self.fail(site, step))
        self.trainers.append(ToyTrainer(config, site=site, fail=hook))
        return self.trainers[-1]


class Hospital:
    """A toy federation on disk, whose processes can be killed and started again.

    With ``anaus`` it is of cohort ``us``, and a site's number of patients is of that one.
    """

    cohort = "ct-mr"
    identities: ClassVar = {}  # site -> its keys; none on an unsigned connection
    method: ClassVar = {}  # sections of the configuration beside the rounds

    def __init__(
        self,
        folder: Path,
        patients=(("a", 3), ("b", 2), ("c", 4)),
        weights=None,
        *,
        anaus=None,
        **federation,
    ):
        self.folder = folder
        self.cohort = "ct-mr" if anaus is None else "us"
        self.sites = _sites(folder, patients, self.cohort)
        settings = _plan(len(self.sites), **federation)
        content = {"preset": "tiny", "federation": settings, "cohorts": [self.cohort]} | self.method
        config = parse_config(content | ({} if anaus is None else {"anaus": anaus}))
        self.config = config if anaus is None else config.for_cohort("us")
        self.store = RunStore(folder / "run", keep=self.config.federation.keep)
        _start(self.store, self.config, "run-1", weights)
        self.bench = ToyBench()

    def app(self):
        """A ClientApp of a fresh process: no trainer is warm."""
        opened = {}

        def open_site(node_config):
            name = node_config["name"]
            if name not in opened:
                identity = self.identities.get(name)
                opened[name] = Site(Path(node_config["site"]), name, self.bench, identity)
            return opened[name]

        return make_app(open_site)

    def grid(self, faults=None, **kwargs):
        return InProcessGrid(self.app(), self.sites, faults=faults, **kwargs)

    def run(self, faults=None, grid=None, **kwargs):
        grid = grid or self.grid(faults)
        clock, sleep = grid.time.clock, grid.time.sleep
        return run_rounds(
            grid, self.config, self.store, clock=clock, sleep=sleep, threads=False, **kwargs
        )

    def rows(self, kind):
        return [row for row in self.store.metrics.rows() if row["kind"] == kind]

    def reasons(self):
        return [(row["round"], row["site"], row["reason"]) for row in self.rows("refusal")]

    def weights(self):
        return self.store.latest().weights

    def digest(self):
        return self.store.latest().manifest.weights_digest


BOTH = {"a": {"ct-mr": 3, "us": 5}, "b": {"ct-mr": 2}, "c": {"ct-mr": 4}, "d": {"us": 2}}


class Consortium(Hospital):
    """Both cohorts in one federation: by default site a is in both, b and c have CT, d scans.

    ``us_plan`` are keys of the ultrasound cohort's own rounds and rules.
    """

    def __init__(self, folder, patients=BOTH, **settings):
        self._open(folder, patients, **settings)
        _sites(folder, patients, "ct-mr")
        for name, store in self.stores.items():
            _start(store, self.config.for_cohort(name), f"run-{name}", None)

    @classmethod
    def opened(cls, folder, patients=BOTH, **settings):
        """The same in another process."""
        found = cls.__new__(cls)
        found._open(folder, patients, **settings)
        return found

    def _open(self, folder, patients, *, anaus=None, us_plan=None, **federation):
        self.folder = folder
        self.sites = {name: folder / "sites" / name for name in dict(patients)}
        count = {
            name: sum(name in has for has in dict(patients).values()) for name in ("ct-mr", "us")
        }
        own = _plan(count["us"], **{**federation, **(us_plan or {})})
        content = {
            "preset": "tiny",
            "cohorts": ["ct-mr", "us"],
            "federation": _plan(count["ct-mr"], **federation),
            "anaus": {**(anaus or BATCH), "federation": own},
        }
        self.config = parse_config(content)
        self.stores = {
            name: RunStore(place)
            for name, place in cohort_folders(folder / "run", self.config).items()
        }
        self.bench = ToyBench()

    def run(self, faults=None, grid=None, *, threads=False, **kwargs):
        grid = grid or self.grid(faults)
        clock, sleep = grid.time.clock, grid.time.sleep
        return run_cohorts(
            grid,
            self.config,
            self.folder / "run",
            clock=clock,
            sleep=sleep,
            threads=threads,
            **kwargs,
        )

    def grid(self, faults=None, **kwargs):
        """``faults`` is told (site, cohort, ``hello`` or the round)."""
        return CohortGrid(self.app(), self.sites, faults=faults, **kwargs)

    def of(self, cohort):
        """One cohort, looked at as a federation of its own."""
        one = Hospital.__new__(Hospital)
        one.__dict__ |= self.__dict__ | {"store": self.stores[cohort], "cohort": cohort}
        return one


class CohortGrid(InProcessGrid):
    """An in-process grid whose faults know the cohort of a message."""

    def __init__(self, app, sites, *, faults=None, **kwargs):
        faults = faults or (lambda *_: Fault())
        super().__init__(
            app, sites, faults=lambda name, group: faults(name, self.cohort, group), **kwargs
        )

    def push_messages(self, messages):
        (message,) = messages
        with self.lock:
            self.cohort = json.loads(message.content["header"]["body"])["cohort"]
            return super().push_messages([message])


def _sites(folder, patients, cohort):
    sites = {}
    for name, count in dict(patients).items():
        site = sites[name] = folder / "sites" / name
        site.mkdir(parents=True)
        counts = count if isinstance(count, dict) or cohort == "ct-mr" else {cohort: count}
        (site / "facts.json").write_text(json.dumps({"patients": counts}))
    return sites


def _plan(sites, **federation):
    return {
        "rounds": 3,
        "steps_per_round": 4,
        "expected_sites": sites,
        "deadline_s": 100.0,
        "discovery_timeout_s": 5.0,
        **federation,
    }


def _start(store, config, run, weights):
    cohort = config.federation.cohort
    shared = config.anaus.share_statistics
    record = RoundRecord(run, 0, cohort, dump_config(config))
    store.save_round(record, weights or toy_weights(cohort=cohort, shared=shared))
