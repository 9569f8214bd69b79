"""Orders as a server gives them."""

import secrets

from agssd_core.config import dump_config, parse_config
from agssd_core.protocol import PROTOCOL_VERSION, RoundOrder
from agssd_core.weights import schema_digest, schema_of, weights_digest


def config_for(**federation):
    settings = {"rounds": 5, "steps_per_round": 2, **federation}
    return parse_config({"preset": "tiny", "federation": settings})


def order_for(weights, number=0, config=None, *, config_text=None, **changes):
    config = config or config_for()
    plan = config.federation
    facts = {
        "protocol": PROTOCOL_VERSION,
        "run": "run-1",
        "cohort": "ct-mr",
        "round": number,
        "steps": plan.steps_per_round,
        "first_step": number * plan.steps_per_round,
        "total_steps": plan.total_steps,
        "config": config_text or dump_config(config),
        "base_digest": weights_digest(weights),
        "nonce": secrets.token_hex(16),
        "site": "north",
        "schema_digest": schema_digest(schema_of(weights)),
    }
    return RoundOrder(**(facts | changes))
