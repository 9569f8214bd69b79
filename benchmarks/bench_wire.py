"""Bytes of real messages in each direction and form, and the CPU time that coding takes.

Messages are those of the product, signed, as Flower's own serialised objects: arrays, headers,
configuration and Flower's framing all count. Coding is timed with the digests of what travels,
decoding with the check of the decoded weights' digest, as a round does both. The must:
differences in int8 take at most 0.27 and in bf16 at most 0.51 of the bytes of whole float32
weights.

    python -m benchmarks.bench_wire [--quick] [--preset small]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flwr.app import Message

from agssd_core.config import RunConfig, dump_config, parse_config
from agssd_core.differences import WIRES, Wire, decode, encode, pack_whole, unpack_whole
from agssd_core.envelope import SealedOrder, SealedUpdate, digests_of, sign, sizes_of
from agssd_core.protocol import PROTOCOL_VERSION, RoundOrder, SiteUpdate
from agssd_core.signing import SigningKey
from agssd_core.training.build import build_model
from agssd_core.weights import Weights, schema_digest, schema_of, weights_digest
from client import wire as site_wire
from client.identity import Identity
from client.outbound import leaving, release
from client.sending import packed, signed
from server import wire as server_wire
from server.rounds import site_config
from simulation.grid import _act_as_server, _deflate

MUST = {"float32": 1.0, "bf16": 0.51, "int8": 0.27}
WIDER = {"model": {"width": 192, "depth": 6, "heads": 6}, "head": {"prototypes": 1024}}
STEP = 1e-3  # of the weights; neither sizes nor times depend on it


@dataclass(frozen=True)
class Model:
    """A base, what a site trained from it, and the configuration of its orders."""

    config: RunConfig
    base: Weights
    trained: Weights


def make_model(content: dict[str, object]) -> Model:
    """A configuration's student, teacher and state, and a step away from them."""
    config = parse_config(content)
    base = build_model(config.agssd, seed=0).shared_weights()
    rng = np.random.default_rng(0)
    trained = {
        name: array + np.float32(STEP) * rng.standard_normal(array.shape, dtype=np.float32)
        for name, array in base.items()
    }
    return Model(config, base, trained)


def order_message(model: Model, wire: Wire, key: SigningKey) -> Message:
    """The server's order of a round, with the round's base in this form."""
    _act_as_server()
    if wire == "float32":
        payload = pack_whole(model.trained)
    else:
        payload = encode(model.base, model.trained, residual={}, wire=wire).payload
    plan = model.config.federation
    order = RoundOrder(
        protocol=PROTOCOL_VERSION,
        run="0" * 16,
        cohort=plan.cohort,
        round=1,
        steps=plan.steps_per_round,
        first_step=plan.steps_per_round,
        total_steps=plan.total_steps,
        config=dump_config(site_config(model.config)),
        base_digest=weights_digest(model.trained),
        nonce="0" * 32,
        site="north",
        wire=wire,
        previous_digest="" if wire == "float32" else weights_digest(model.base),
        schema_digest=schema_digest(schema_of(model.base)),
        payload_digests=digests_of(payload),
        payload_sizes=sizes_of(payload),
    )
    sealed = SealedOrder(order, payload, sign(order, key))
    return server_wire.encode_order(sealed, node=101, ttl_s=60.0)


def released(model: Model, order: RoundOrder) -> SiteUpdate:
    """What the site's door lets out under the default rules: student, teacher and state."""
    merge = model.config.federation.merge
    schema = schema_of(leaving(model.base, merge))
    metrics = {f"metric_{number}": 1 / (number + 3) for number in range(24)}
    update = leaving(model.trained, merge)
    return release(
        update, order=order, schema=schema, site="north", patient_count=10, metrics=metrics
    )


def travelled(message: Message) -> int:
    """Bytes of all objects that Flower would send."""
    return sum(len(data) for data in _deflate(message).values())


def seconds_of(act: Callable[[], object], repetitions: int) -> float:
    """Median CPU seconds of several calls; other processes do not count."""
    taken = []
    for _ in range(repetitions):
        begun = time.process_time()
        act()
        taken.append(time.process_time() - begun)
    return statistics.median(taken)


def run(label: str, content: dict[str, object], *, repetitions: int) -> bool:
    """Print one model's table; whether the musts are met."""
    model, key = make_model(content), SigningKey.create()
    identity = Identity(key, key.public)
    size = sum(array.nbytes for array in model.base.values())
    print(f"{label}, {len(model.base)} arrays, {size / 1e6:.1f} MB in memory")
    found: dict[tuple[str, str], int] = {}
    times: dict[str, tuple[float, float]] = {}
    ok = True
    for wire in WIRES:
        message = order_message(model, wire, key)
        found["down", wire] = travelled(message)
        update = released(model, site_wire.decode_order(message).order)
        sealed, _ = packed(update, model.base, wire=wire, residual={})
        reply = site_wire.encode_update(signed(sealed, identity), reply_to=message)
        found["up", wire] = travelled(reply)
        _require_same(model, sealed)
        coding = seconds_of(
            lambda update=update, wire=wire: packed(update, model.base, wire=wire, residual={}),
            repetitions,
        )
        times[wire] = coding, seconds_of(lambda s=sealed: _require_same(model, s), repetitions)
    for direction in ("down", "up"):
        for wire in WIRES:
            ratio = found[direction, wire] / found[direction, "float32"]
            ok &= ratio <= MUST[wire]
            verdict = "" if ratio <= MUST[wire] else "  MISSED"
            print(
                f"  {direction:4s} {wire:7s} {found[direction, wire] / 1e6:8.3f} MB, "
                f"{ratio:.4f} x float32 (must {MUST[wire]:.2f} x){verdict}"
            )
    for wire in WIRES[1:]:
        (coding, reading), (plain, plain_reading) = times[wire], times["float32"]
        print(
            f"  time {wire:7s} coding {coding / plain:.1f} x, decoding "
            f"{reading / plain_reading:.1f} x float32 ({size / coding / 1e6:.0f} and "
            f"{size / reading / 1e6:.0f} MB/s of weights)"
        )
    return ok


def _decoded(model: Model, sealed: SealedUpdate) -> Weights:
    wire = next(each for each in WIRES if each == sealed.header.wire)
    if wire == "float32":
        return unpack_whole(sealed.payload)
    return decode(sealed.payload, model.base, wire=wire)


def _require_same(model: Model, sealed: SealedUpdate) -> None:
    if weights_digest(_decoded(model, sealed)) != sealed.header.weights_digest:
        raise AssertionError("the server would decode other bits than the site says")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the tiny preset only")
    parser.add_argument("--preset", help="another preset only, such as small or base")
    given = parser.parse_args()
    models: dict[str, dict[str, object]] = {"tiny preset": {"preset": "tiny"}}
    if not given.quick:
        models["tiny preset, ViT of width 192 and depth 6"] = {"preset": "tiny", "agssd": WIDER}
    if given.preset:
        models = {f"{given.preset} preset": {"preset": given.preset}}
    results = [run(label, content, repetitions=3) for label, content in models.items()]
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
