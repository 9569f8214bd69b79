"""A message above its cap: refused by its header, with no array fetched, on either side."""

import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.superlink.grid import http_grid

from agssd_core.envelope import SealedOrder, SealedUpdate, digests_of, sizes_of
from agssd_core.errors import EngineError, OversizeError
from agssd_core.journal import entries_of
from client import launcher
from client import wire as site_wire
from client.connection import load_connection, save_connection
from client.pulling import Door, guarded
from server import pulling, wire
from tests.support.enrolled import enrol
from tests.support.merging import model, update_of
from tests.support.orders import order_for

MB = 1_000_000
KINDS = ("Message", "RecordDict", "ConfigRecord", "ArrayRecord")


def update_header(**changes):
    return update_of(model(0), **changes).header


class Store:
    """Objects of one message as they lie at the other side, and what was fetched of them."""

    def __init__(self, message):
        with no_object_id_recompute():
            self.tree = get_object_tree(message)
            nested = get_all_nested_objects(message)
            self.kinds = {name: type(one).__name__ for name, one in nested.items()}
            self.objects = {name: one.deflate() for name, one in nested.items()}
        self.message_id = self.tree.object_id
        self.fetched = []

    def ids(self):
        return [each.object_id for each in iterate_object_tree(self.tree)]

    def fetch(self, name):
        self.fetched.append(name)
        return self.objects[name]

    def bytes_fetched(self):
        return sum(len(self.objects[name]) for name in self.fetched)

    def only_the_header(self):
        return {self.kinds[name] for name in self.fetched} <= set(KINDS)


def payload_of(size):
    return {"student": bytes(range(250)) * (size // 250)}


def message_with(header, size):
    """A message with this header and so many bytes of arrays, whatever the header says."""
    arrays = {n: Array("uint8", (len(d),), "safetensors", d) for n, d in payload_of(size).items()}
    content = {"header": ConfigRecord({"kind": "update", "body": header, "signature": ""})}
    return launcher.local_message("train", RecordDict(content | {"arrays": ArrayRecord(arrays)}))


def declaring(size, *, declared=None):
    sizes = {"student": size if declared is None else declared}
    return message_with(update_header(payload_sizes=sizes).to_json(), size)


class Grid:
    """As much of Flower's grid as a pull needs."""

    def __init__(self, store):
        self.node, self.run, self.confirmed = None, SimpleNamespace(run_id=1), []
        self._runtime_client = self
        self.store = store

    def ConfirmMessageReceived(self, request):  # noqa: N802
        self.confirmed.append(request.message_object_id)

    def pull(self, cap):
        engine = SimpleNamespace(**vars(http_grid))
        limited = pulling._limited(http_grid.pull_objects, engine, self)
        with pulling.at_most(cap):
            return limited(self.store.ids(), self.store.fetch)


def test_the_server_takes_what_an_update_declares():
    store = Store(declaring(12 * MB))
    assert Grid(store).pull(12 * MB) == store.objects
    assert sorted(store.fetched) == sorted(store.objects)


def test_the_server_fetches_no_array_of_an_update_that_declares_more_than_its_cap():
    store = Store(declaring(12 * MB))
    grid = Grid(store)
    with pytest.raises(http_grid.ObjectPullError, match=wire.NOT_FETCHED):
        grid.pull(11 * MB)
    assert store.fetched
    assert store.only_the_header()
    assert grid.confirmed == [store.message_id]  # the SuperLink forgets it


@pytest.mark.parametrize("header", ['{"payload_sizes": {"student": -5}}', "[1]", "{", "x" * 300])
def test_a_header_that_declares_nonsense_does_not_buy_more_than_the_cap(header):
    store = Store(message_with(header, 60 * MB))
    with pytest.raises(http_grid.ObjectPullError, match=wire.NOT_FETCHED):
        Grid(store).pull(8 * MB)
    assert store.bytes_fetched() < 30 * MB  # the cap, and a chunk for each thread that fetches


def test_an_update_that_brings_more_than_it_declares_is_left_at_that():
    store = Store(declaring(60 * MB, declared=6 * MB))
    with pytest.raises(http_grid.ObjectPullError, match=wire.NOT_FETCHED):
        Grid(store).pull(100 * MB)
    assert store.bytes_fetched() < 30 * MB


def test_a_header_of_many_megabytes_is_refused():
    store = Store(message_with("x" * (5 << 20), 1000))
    with pytest.raises(http_grid.ObjectPullError, match=wire.NOT_FETCHED):
        Grid(store).pull(100 * MB)
    assert store.only_the_header()


def test_a_message_of_very_many_objects_is_refused_before_anything_is_fetched():
    ids = [f"{number:064x}" for number in range(200)]
    fetched = []
    limited = pulling._limited(http_grid.pull_objects, http_grid, Grid(None))
    with pulling.at_most(MB), pytest.raises(http_grid.ObjectPullError, match=wire.NOT_FETCHED):
        limited(ids, fetched.append)
    assert fetched == []


def test_the_wire_knows_a_reply_that_was_not_fetched():
    error = http_grid.ObjectPullError("0" * 64, wire.NOT_FETCHED)
    reply = site_wire.encode_fault(f"unavailable. {error}", reply_to=declaring(1000))
    with pytest.raises(OversizeError, match="not fetched"):
        wire.decode_reply(reply, max_bytes=1)


@pytest.mark.parametrize("name", ["pull_objects", "ObjectPullError"])
def test_the_server_does_not_start_with_a_flower_that_lacks_a_name(monkeypatch, name):
    pulling.require_hooks()
    monkeypatch.delattr(http_grid, name)
    with pytest.raises(EngineError, match=rf"{name}.*Install flwr 1\.41"):
        pulling.limit_pulls(None)


class Node:
    """The SuperNode's own pull of one message, with its real state and a server made up."""

    def __init__(self, store, message):
        from flwr.supercore.object_store import ObjectStoreFactory
        from flwr.supernode import start_client_internal
        from flwr.supernode.nodestate import NodeStateFactory

        self.engine = start_client_internal
        objects = ObjectStoreFactory()
        self.state = NodeStateFactory(objectstore_factory=objects).state()
        self.objects = objects.store()
        self.store, self.message, self.confirmed = store, message, []
        message.metadata.__dict__["_message_id"] = store.message_id

    def pull(self, door, receive=None):
        run = SimpleNamespace(
            run_id=1, fab_hash="0" * 64, series_id=1, primary_task_type="", override_config={}
        )
        self.state.get_run = lambda _: run
        return guarded(self.engine._pull_and_store_message, self.engine, door)(
            state=self.state,
            object_store=self.objects,
            node_config={},
            receive=receive or (lambda: (self.message, self.store.tree)),
            get_run=None,
            get_fab=None,
            pull_object=lambda _run, name: self.store.fetch(name),
            confirm_message_received=lambda *given: self.confirm(*given),
            trusted_entities=None,
        )

    def confirm(self, _run, name):
        self.confirmed.append(name)

    def answer(self):
        """What the executor does with a message: its reply is in the node's hands."""
        reply = Message(Error(code=1, reason="done"), reply_to=self.message)
        self.engine._insert_message(reply, self.state, self.objects)

    def replies(self):
        found = self.state.get_messages_legacy(is_reply=True)
        return [each.error.reason for each in found if each.has_error()]


def order_of(size):
    parts = payload_of(size)
    order = order_for(model(0), payload_sizes=sizes_of(parts), payload_digests=digests_of(parts))
    launcher.local_message("train", RecordDict())  # tells Flower who we are
    sent = wire.encode_order(SealedOrder(order, parts), node=1, ttl_s=60.0)
    return launcher.local_message("train", sent.content)


def site_with(folder, megabytes):
    enrol(folder)
    (folder / "policy.yaml").write_text(f"work: {{order_megabytes: {megabytes}}}\n")
    return folder


def test_a_site_takes_in_an_order_within_its_policy(tmp_path):
    message = order_of(7 * MB)
    node = Node(Store(message), message)
    assert node.pull(Door(frozenset(), site_with(tmp_path, 7))) == 1
    assert node.replies() == []
    assert all(node.objects.get(name) == data for name, data in node.store.objects.items())
    assert node.confirmed == [node.store.message_id]
    assert not (tmp_path / "journal.jsonl").exists()


def test_a_site_fetches_no_array_of_an_order_above_its_policy(tmp_path):
    message = order_of(7 * MB)
    node = Node(Store(message), message)
    assert node.pull(Door(frozenset(), site_with(tmp_path, 6.9))) == 1
    assert node.store.fetched
    assert node.store.only_the_header()
    assert node.replies() == ["declined-size"]
    (entry,) = entries_of(tmp_path)
    assert (entry.kind, entry.facts) == ("refusal", {"reason": "size"})


def test_a_site_stops_fetching_an_order_that_brings_more_than_it_declares(tmp_path):
    message = declaring(60 * MB, declared=6 * MB)
    node = Node(Store(message), message)
    assert node.pull(Door(frozenset(), site_with(tmp_path, 4096))) == 1
    assert node.store.bytes_fetched() < 30 * MB
    assert node.replies() == ["declined-size"]
    assert [entry.facts["reason"] for entry in entries_of(tmp_path)] == ["size"]


def test_a_reply_does_not_wait_for_the_next_message(tmp_path):
    """The coordinator dies before a receipt is confirmed, and the message is answered anyway.

    Its answer is sent in the place of the next message's, whose own must not lie in the node.
    """
    message = order_of(MB)
    node, door = Node(Store(message), message), Door(frozenset(), site_with(tmp_path, 7))

    def cut(_run, _name):
        raise ConnectionError

    node.confirm = cut
    assert node.pull(door) is None
    assert node.pull(door, receive=lambda: None) is None
    node.answer()
    assert node.pull(door, receive=lambda: None) == 1  # the engine goes on to send what there is
    assert node.replies() == ["done"]
    assert node.pull(door, receive=lambda: None) is None


@pytest.mark.parametrize(("started_with", "ended"), [(1, [signal.SIGTERM]), (2, []), (0, [])])
def test_a_node_ends_between_two_messages_when_its_site_has_another_key(
    tmp_path, monkeypatch, started_with, ended
):
    enrol(tmp_path)
    save_connection(tmp_path, replace(load_connection(tmp_path), key_id=2))
    message = order_of(MB)
    node, seen = Node(Store(message), message), []
    monkeypatch.setattr(signal, "raise_signal", seen.append)
    door = Door(frozenset(), tmp_path, started_with)
    assert node.pull(door) == 1
    assert seen == []  # a message that has come is taken in
    assert node.pull(door, receive=lambda: None) is None
    assert seen == ended


def test_an_update_as_a_site_sends_it_declares_what_it_has():
    parts = payload_of(3 * MB)
    header = update_header(payload_sizes=sizes_of(parts), payload_digests=digests_of(parts))
    message = site_wire.encode_update(SealedUpdate(header, parts), reply_to=declaring(1000))
    assert Grid(store := Store(message)).pull(3 * MB) == store.objects
