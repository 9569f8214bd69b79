"""A toy trainer in numpy with all that a round must keep: optimiser moments, teacher, state."""

import json
from pathlib import Path

import numpy as np

from agssd_core.config import config_from_json, dump_config, parse_config
from agssd_core.training.checkpoint import SiteState, read_site_state, save_site_state
from client.app import make_app
from client.site import Site, SiteFacts
from server.manifest import RoundRecord
from server.rounds import run_rounds
from server.store import RunStore
from simulation.grid import InProcessGrid

__all__ = ["Hospital", "ToyBench", "ToyTrainer", "config_from_json", "toy_weights"]

SHAPES = {"encoder.blocks.0.w": (4, 3), "encoder.bias": (3,), "head.w": (3, 5)}
RATE, MOMENTUM = 0.1, 0.9


def toy_weights(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    weights = {
        f"{group}/{n}": a.copy() for group in ("student", "teacher") for n, a in arrays.items()
    }
    return weights | {
        "state/centre": np.zeros(5, np.float32),
        "state/density": np.float32(0.5).reshape(()),
    }


class ToyTrainer:
    """Gradient descent with momentum towards a target that the site's name draws."""

    def __init__(self, config, *, site, fail=None):
        self.config, self.site, self.fail = config, site, fail
        self.weights, self.moments, self.anchor = {}, {}, {}
        self.steps_taken = 0
        self.reset = None

    def load(self, weights):
        self.weights = {n: a.copy() for n, a in weights.items()}
        self.anchor = {n: a.copy() for n, a in weights.items()}

    def shared_weights(self):
        return {n: a.copy() for n, a in self.weights.items()}

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
        keep = np.float32(self.config.agssd.teacher.momentum_at(step, total))
        loss = 0.0
        for name in SHAPES:
            weight = self.weights[f"student/{name}"]
            noise = np.float32(0.01) * rng.standard_normal(weight.shape).astype(np.float32)
            gradient = weight - target + noise
            moment = np.float32(MOMENTUM) * self.moments.get(name, np.zeros_like(weight)) + gradient
            self.moments[name] = moment
            self.weights[f"student/{name}"] = weight - np.float32(RATE) * moment
            teacher = self.weights[f"teacher/{name}"]
            self.weights[f"teacher/{name}"] = (
                keep * teacher + (1 - keep) * self.weights[f"student/{name}"]
            )
            loss += float(np.square(weight - target).mean())
        self.weights["state/centre"] = np.float32(0.9) * self.weights["state/centre"] + target
        self.steps_taken += 1
        return loss

    def save_state(self, folder, stamp):
        save_site_state(folder, SiteState(dict(self.moments), {}), stamp)

    def load_state(self, folder, stamp):
        state = read_site_state(folder, stamp)
        self.moments = {} if state is None else {n: np.array(a) for n, a in state.arrays.items()}
        return state is not None


class ToyBench:
    """Opens toy trainers; a site's folder holds ``facts.json``. Every trainer is remembered."""

    def __init__(self, fail=None):
        self.trainers, self.fail = [], fail

    def facts(self, folder):
        content = json.loads((folder / "facts.json").read_text())
        return SiteFacts(content["patients"], content["patients"])

    def trainer(self, _folder, config, *, site):
        hook = None if self.fail is None else (lambda step: self.fail(site, step))
        self.trainers.append(ToyTrainer(config, site=site, fail=hook))
        return self.trainers[-1]


class Hospital:
    """A toy federation on disk, whose processes can be killed and started again."""

    def __init__(
        self, folder: Path, patients=(("a", 3), ("b", 2), ("c", 4)), weights=None, **federation
    ):
        self.folder = folder
        self.sites = {}
        for name, count in dict(patients).items():
            site = folder / "sites" / name
            site.mkdir(parents=True)
            (site / "facts.json").write_text(json.dumps({"patients": count}))
            self.sites[name] = site
        settings = {
            "rounds": 3,
            "steps_per_round": 4,
            "expected_sites": len(self.sites),
            "deadline_s": 100.0,
            "discovery_timeout_s": 5.0,
            **federation,
        }
        self.config = parse_config({"preset": "tiny", "federation": settings})
        self.store = RunStore(folder / "run", keep=self.config.federation.keep)
        record = RoundRecord("run-1", 0, "ct-mr", dump_config(self.config))
        self.store.save_round(record, weights or toy_weights())
        self.bench = ToyBench()

    def app(self):
        """A ClientApp of a fresh process: no trainer is warm."""
        opened = {}

        def open_site(node_config):
            name = node_config["name"]
            if name not in opened:
                opened[name] = Site(Path(node_config["site"]), name, self.bench)
            return opened[name]

        return make_app(open_site)

    def grid(self, faults=None):
        return InProcessGrid(self.app(), self.sites, faults=faults)

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
