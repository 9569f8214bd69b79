"""One hostile site of five, through real rounds of the toy, and how far it led the merge."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from agssd_core.protocol import SiteUpdate
from agssd_core.weights import weights_digest
from server import wire
from simulation.grid import Fault
from tests.support.hostile import forged
from tests.support.sealing import weights_in
from tests.support.toy import Hospital, toy_weights

FIVE = tuple((name, 3) for name in "abcde")
HOSTILE = "b"


def flipped_sign(base, honest, _rng):
    return base - 10 * (honest - base)


def noise(base, honest, rng):
    """What a site without any label or scan could send: noise of thirty times its step's size."""
    step = max(float(np.std(honest - base)), 1e-3)
    return np.asarray(base + 30 * step * rng.standard_normal(base.shape), base.dtype)


BOTH = ("student", "teacher")
# Name -> (what becomes of an array, groups that it is done to).
ATTACKS = {
    "sign flip x10": (flipped_sign, BOTH),
    "noise": (noise, BOTH),
    "teacher only": (flipped_sign, ("teacher",)),
}


def poisoning(base_of, groups, change, *, rng, max_bytes=1 << 20):
    """A site's tamper: these groups of an update altered against the round's base, well sealed.

    ``base_of()`` gives the weights that the round started from. Groups that the rule of the run
    does not let sites send are not there to be altered.
    """

    def tamper(message):
        update = wire.decode_reply(message, max_bytes=max_bytes)
        base, weights = base_of(), dict(weights_in(update))
        for name in sorted(weights):  # arrays are decoded in no fixed order
            if name.split("/")[0] in groups:
                weights[name] = change(base[name], weights[name], rng)
        header = replace(update.header, weights_digest=weights_digest(weights))
        return forged(SiteUpdate(header, weights), message)

    return tamper


def poison(groups, change=flipped_sign, *, seed=0):
    """Site b alters these groups of its update of round 0."""
    rng = np.random.default_rng([seed, 99])
    tamper = poisoning(lambda: toy_weights(seed), groups, change, rng=rng)
    return lambda name, group: Fault(tamper=tamper if (name, group) == (HOSTILE, "0") else None)


def poisoned(folder, merge, groups, change=flipped_sign, *, seed=0):
    """A run of one round with such a site in it."""
    run = Hospital(folder / "x", FIVE, toy_weights(seed), rounds=1, min_sites=5, merge=merge)
    run.run(poison(groups, change, seed=seed))
    assert run.reasons() == []
    return run, toy_weights(seed)


def poisoned_run(folder: Path, student: str, attack: str, *, seed: int):
    """The same by the name of an attack."""
    change, groups = ATTACKS[attack]
    return poisoned(folder, {"student": student}, groups, change, seed=seed)


def excess_of(poisoned_one) -> dict[str, float]:
    """Merged distance from the honest mean over the largest honest distance, by group."""
    run, base = poisoned_one
    found = {}
    for kind in BOTH:
        flat = [_flat(weights, kind) for weights in _honest(run, base)]
        middle = np.mean(flat, axis=0)
        reach = max(np.linalg.norm(vector - middle) for vector in flat)
        found[kind] = float(np.linalg.norm(_flat(run.weights(), kind) - middle) / reach)
    return found


def reach_of(poisoned_one) -> dict[str, float]:
    """Length of the merged step over that of the longest honest one, by group."""
    run, base = poisoned_one
    found = {}
    for kind in BOTH:
        start = _flat(base, kind)
        longest = max(np.linalg.norm(_flat(w, kind) - start) for w in _honest(run, base))
        found[kind] = float(np.linalg.norm(_flat(run.weights(), kind) - start) / longest)
    return found


def _honest(run, base):
    """What the honest sites ended on; their teachers as the server's rule makes them."""
    keep = run.config.agssd.teacher.momentum_product(0, 4, 4)
    honest = [t.shared_weights() for t in run.bench.trainers if t.site != HOSTILE]
    assert len(honest) == 4
    if run.config.federation.merge.teacher_rule != "average":
        for weights in honest:
            for name in [name for name in weights if name.startswith("teacher/")]:
                student = weights["student/" + name.removeprefix("teacher/")]
                weights[name] = keep * base[name] + (1 - keep) * student
    return honest


def _flat(weights, kind):
    names = sorted(name for name in weights if name.startswith(f"{kind}/"))
    return np.concatenate([weights[name].ravel().astype(np.float64) for name in names])
