"""Small models, updates and spools for tests of the server's rooms."""

import numpy as np

from agssd_core.protocol import PROTOCOL_VERSION, SiteUpdate, UpdateHeader
from agssd_core.weights import schema_digest, schema_of, weights_digest
from server.admission import AdmissionRules

SHAPES = {
    "state/centre_cls": (6,),
    "state/density_mean": (),
    "student/decoder.weight": (3, 2),
    "student/encoder.bias": (4,),
    "student/encoder.weight": (4, 5),
    "teacher/encoder.bias": (4,),
    "teacher/encoder.weight": (4, 5),
}
GROUPS = ("student", "teacher", "state")


def model(seed, *, scale=1.0, dtype=np.float32):
    """Random arrays of every group, one of them a scalar."""
    rng = np.random.default_rng(seed)
    return {n: np.asarray(scale * rng.standard_normal(s), dtype) for n, s in SHAPES.items()}


def moved(base, seed, *, scale=0.1):
    """The base after some training: student, teacher and state each moved a little."""
    step = model(seed, scale=scale, dtype=np.float64)
    sizes = {"student": 1.0, "teacher": 0.01, "state": 0.3}
    return {n: np.asarray(base[n] + sizes[n.split("/")[0]] * step[n], base[n].dtype) for n in base}


def without(weights, group):
    return {n: a for n, a in weights.items() if not n.startswith(f"{group}/")}


class MemoryUpdates:
    """A spool in memory, with its sites in the order of arrival."""

    def __init__(self, updates):
        self.updates = updates

    def sites(self):
        return tuple(self.updates)

    def read(self, site, name):
        return self.updates[site][name]


def update_of(weights, **changes):
    """A well-formed update of site a, or one with some header fields changed."""
    facts = {
        "protocol": PROTOCOL_VERSION,
        "run": "run-1",
        "cohort": "ct-mr",
        "site": "a",
        "round": 3,
        "steps": 10,
        "patient_count": 12,
        "base_digest": "base",
        "nonce": "n-a",
        "schema_digest": schema_digest(schema_of(weights)),
        "weights_digest": weights_digest(weights),
        "metrics": {"loss": 1.5, "optimiser_reset": 0},
    }
    return SiteUpdate(UpdateHeader(**(facts | changes)), weights)


def rules_for(base, **changes):
    """Rules that ``update_of`` satisfies, with site b enrolled and asked as well."""
    facts = {
        "base": base,
        "groups": GROUPS,
        "run": "run-1",
        "cohort": "ct-mr",
        "round": 3,
        "steps": 10,
        "base_digest": "base",
        "nonces": {"a": "n-a", "b": "n-b"},
        "enrolled": {"a": 12, "b": 5},
    }
    return AdmissionRules(**(facts | changes))
