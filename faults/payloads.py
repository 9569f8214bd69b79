"""Rows 5 to 7: payloads that were damaged, made up, or sent before."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agssd_core.errors import AgssdError
from client import wire as site_wire
from faults.suite import Fault, Try
from faults.toys import quick_disk
from server import wire as server_wire
from server.exchange import read_update
from server.manifest import RoundRecord
from simulation.grid import Fault as GridFault
from tests.support.fuzzing import Pair, flipped, message_of
from tests.support.hostile import BAD, forged
from tests.support.signing import SignedHospital
from tests.support.toy import Hospital

WIRES = ("float32", "bf16", "int8")
NAMED = {"signature", "digest", "size", "schema", "protocol", "site", "malformed"}
Texts, Parts = dict[str, str], dict[str, bytes]
Damage = Callable[[Texts, Parts, np.random.Generator], tuple[Texts, Parts]]


def cut_short(texts: Texts, parts: Parts, rng: np.random.Generator) -> tuple[Texts, Parts]:
    """The end of the header or of a part is missing."""
    name = str(rng.choice([*texts, *parts]))
    value = texts.get(name, parts.get(name, b""))
    kept = value[: int(rng.integers(len(value)))]
    return (
        {n: kept if n == name else v for n, v in texts.items()},
        {n: kept if n == name else v for n, v in parts.items()},
    )


def damaged_updates(damage: Damage) -> Callable[[Path, int], Iterator[Try]]:
    """Refused by name of the site and class of reason; the honest one before and after passes."""

    def run(folder: Path, tries: int) -> Iterator[Try]:
        rng = np.random.default_rng(13)
        with quick_disk():
            pairs = [Pair(folder / wire, wire) for wire in WIRES]
            updates = [pair.site.answer(pair.order) for pair in pairs]
            for number in range(tries):
                pair, update = pairs[number % 3], updates[number % 3]
                texts = {
                    "kind": "update",
                    "body": update.header.to_json(),
                    "signature": update.signature,
                }
                message = message_of(*damage(texts, update.payload, rng))
                found, reason = read_update(message, pair.rules, asked="north")
                yield Try(
                    found is None and reason in NAMED, f"{reason}, taken: {found is not None}"
                )
            for pair, update in zip(pairs, updates, strict=True):
                texts = {"kind": "update", "body": update.header.to_json()}
                texts["signature"] = update.signature
                honest, _ = read_update(
                    message_of(texts, update.payload), pair.rules, asked="north"
                )
                if honest is None:
                    yield Try(passed=False, detail="an honest update was refused")

    return run


def damaged_orders(damage: Damage) -> Callable[[Path, int], Iterator[Try]]:
    """Nothing is trained."""

    def run(folder: Path, tries: int) -> Iterator[Try]:
        rng = np.random.default_rng(14)
        with quick_disk():
            pairs = [Pair(folder / wire, wire) for wire in WIRES]
            for number in range(tries):
                pair = pairs[number % 3]
                order = pair.order
                texts = {
                    "kind": "order",
                    "body": order.order.to_json(),
                    "signature": order.signature,
                }
                message = message_of(*damage(texts, order.payload, rng))
                try:
                    pair.site.answer(site_wire.decode_order(message))
                    yield Try(passed=False, detail="it was carried out")
                except AgssdError:
                    yield Try(pair.site.workbench.trainers == [], "a trainer was opened")

    return run


def _two_rounds(folder: Path) -> Hospital:
    return Hospital(folder, rounds=2, max_update_norm=5.0)


def made_up(folder: Path, tries: int) -> Iterator[Try]:
    """NaN, shapes, types, counts ...: weights are those of a round without the site, bitwise."""
    with quick_disk():
        absent = _two_rounds(folder / "absent")
        absent.run(lambda name, group: GridFault(offline=(name, group) == ("b", "1")))
        for number in range(tries):
            case = list(BAD)[number % len(BAD)]
            tamper, reason = BAD[case]
            run = _two_rounds(folder / str(number))
            run.run(_only_b(tamper))
            good = run.reasons() == [(1, "b", reason)] and run.digest() == absent.digest()
            yield Try(good, f"{case}: {run.reasons()}")


def _only_b(tamper: Callable[[Any], Any]) -> Callable[[str, str], GridFault]:
    return lambda name, group: GridFault(tamper=tamper if (name, group) == ("b", "1") else None)


def sent_before(folder: Path, tries: int) -> Iterator[Try]:
    """Of the round before, another run or another site, and the same one twice; all signed."""
    chance = random.Random(15)
    with quick_disk():
        absent = SignedHospital(folder / "absent", rounds=2)
        absent.run(lambda name, group: GridFault(offline=(name, group) == ("b", "1")))
        plain = SignedHospital(folder / "plain", rounds=2)
        plain.run()
        for number in range(tries):
            place = folder / str(number)
            case = ("round", "run", "site", "twice")[number % 4]
            run = SignedHospital(place / "x", rounds=2)
            if case == "twice":
                run.run(lambda *_: GridFault(twice=True))
                yield Try(run.digest() == plain.digest(), "counted twice")
                continue
            run.run(_replays(case, run, place, chance))
            good = run.reasons() == [(1, "b", case)] and run.digest() == absent.digest()
            yield Try(good, f"{case}: {run.reasons()}")


def _replays(
    case: str, run: SignedHospital, place: Path, chance: random.Random
) -> Callable[[str, str], GridFault]:
    """In round 1 site b answers with an update that was signed for something else."""
    kept: list[Any] = []

    def keep(message: Any) -> Any:
        kept.append(server_wire.decode_reply(message, max_bytes=1 << 20))
        return message

    source = {"round": ("b", "0"), "site": ("a", "1"), "run": ("b", "1")}[case]
    if case == "run":
        other = SignedHospital(place / "other", rounds=2)
        other.identities, other.server_key, other.keys = run.identities, run.server_key, run.keys
        _name_run(other, f"run-{chance.randrange(2, 9)}")
        other.run(lambda name, group: GridFault(tamper=keep if (name, group) == source else None))
    tampers = {("b", "1"): lambda message: forged(kept[0], message)}
    if case != "run":
        tampers[source] = keep
    return lambda name, group: GridFault(tamper=tampers.get((name, group)))


def _name_run(run: SignedHospital, name: str) -> None:
    first = run.store.load(0)
    record = RoundRecord(name, 0, first.manifest.cohort, first.manifest.config)
    run.store.save_round(record, first.weights)


FAULTS = [
    Fault(5, "a flipped bit in an update", damaged_updates(flipped), 1000, short=60),
    Fault(5, "a truncated update", damaged_updates(cut_short), 1000, short=60),
    Fault(5, "a flipped bit in an order", damaged_orders(flipped), 1000, short=60),
    Fault(5, "a truncated order", damaged_orders(cut_short), 1000, short=60),
    Fault(6, "NaN, shapes, types, keys, counts ... in an update", made_up, len(BAD), short=2),
    Fault(7, "an update of another round, run or site, or twice", sent_before, 4, short=4),
]
