"""The in-process grid: real messages as bytes, virtual time, faults."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from simulation.grid import ElapsedTime, Fault, InProcessGrid, VirtualTime


def echo_app(seen):
    app = ClientApp()

    @app.train()
    def train(message, context):
        seen.append((context.node_config["name"], message.metadata.group_id))
        record = message.content.get("arrays")
        if record is not None:
            array = record["w"]
            array.data = b"changed at the site"
        return Message(message.content, reply_to=message)

    @app.query("hello")
    def hello(_message, _context):
        raise ValueError("broken")

    return app


@pytest.fixture
def world(tmp_path):
    seen = []

    def build(faults=None):
        return InProcessGrid(
            echo_app(seen), {"a": tmp_path / "a", "b": tmp_path / "b"}, faults=faults
        )

    return build, seen


def order(grid, name="a", group="0", kind="train", records=None):
    node = {"a": 101, "b": 102}[name]
    content = RecordDict(records or {"c": ConfigRecord({"n": 1})})
    (identifier,) = grid.push_messages([Message(content, node, kind, group_id=group)])
    return identifier


def test_node_ids_follow_sorted_names_and_offline_nodes_are_not_listed(world):
    grid = world[0]()
    assert list(grid.get_node_ids()) == [101, 102]
    grid.offline.add("a")
    assert list(grid.get_node_ids()) == [102]


def test_a_reply_names_its_order_and_comes_once(world):
    grid = world[0]()
    identifier = order(grid)
    (reply,) = grid.pull_messages([identifier])
    assert reply.metadata.reply_to_message_id == identifier
    assert reply.metadata.src_node_id == 101
    assert reply.metadata.message_id
    assert list(grid.pull_messages([identifier])) == []


def test_no_array_is_shared_with_the_server(world):
    grid = world[0]()
    record = ArrayRecord([np.zeros(3, np.float32)])
    record["w"] = record.pop("0")
    before = record["w"].data
    (reply,) = grid.pull_messages([order(grid, records={"arrays": record})])
    assert record["w"].data == before
    assert reply.content["arrays"]["w"].data == b"changed at the site"


def test_delay_is_virtual(world):
    grid = world[0](lambda name, _group: Fault(delay_s=30.0 if name == "a" else 0.0))
    slow, fast = order(grid, "a"), order(grid, "b")
    assert len(list(grid.pull_messages([slow, fast]))) == 1
    grid.time.sleep(29.0)
    assert list(grid.pull_messages([slow])) == []
    grid.time.sleep(1.0)
    assert len(list(grid.pull_messages([slow]))) == 1


def test_a_node_works_its_orders_off_in_turn(world):
    build, seen = world
    grid = build()
    first, second = order(grid, group="0"), order(grid, group="1")
    grid.pull_messages([second])
    assert seen == [("a", "0"), ("a", "1")]
    assert len(list(grid.pull_messages([first]))) == 1


def test_faults(world):
    build, seen = world
    faults = {
        "offline": Fault(offline=True),
        "lost": Fault(lost_reply=True),
        "upload": Fault(upload_fails=True),
        "twice": Fault(twice=True),
    }
    grid = build(lambda _name, group: faults.get(group, Fault()))
    replies = {group: list(grid.pull_messages([order(grid, group=group)])) for group in faults}
    assert replies["offline"] == replies["lost"] == []
    assert replies["upload"][0].error.code == 4
    assert len(replies["twice"]) == 1
    groups = [group for _, group in seen]
    assert groups == ["lost", "upload", "twice", "twice"]


def test_corruption_acts_on_the_serialised_objects(world):
    def zero(objects):
        return {n: d.replace(b"changed", b"CHANGED") for n, d in objects.items()}

    grid = world[0](lambda _name, _group: Fault(corrupt=zero))
    record = ArrayRecord([np.zeros(3, np.float32)])
    record["w"] = record.pop("0")
    (reply,) = grid.pull_messages([order(grid, records={"arrays": record})])
    assert reply.content["arrays"]["w"].data == b"CHANGED at the site"


def test_an_app_that_raises_becomes_the_error_that_flower_sends(world):
    grid = world[0]()
    (reply,) = grid.pull_messages([order(grid, kind="query.hello")])
    assert reply.error.code == 2
    assert "ValueError" in reply.error.reason


def test_send_and_receive_and_the_run(world):
    grid = world[0]()
    message = grid.create_message(RecordDict({"c": ConfigRecord()}), "train", 102, "5")
    (reply,) = grid.send_and_receive([message], timeout=1.0)
    assert reply.metadata.group_id == "5"
    assert grid.run.run_id == reply.metadata.run_id
    grid.set_run(grid.run)


def test_clocks():
    virtual, real = VirtualTime(), ElapsedTime()
    virtual.sleep(5.0)
    assert virtual.clock() == 5.0
    before = real.clock()
    real.sleep(100.0)
    assert 100.0 <= real.clock() - before < 110.0
