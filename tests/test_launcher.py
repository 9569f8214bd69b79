"""What the launcher adds to Flower: bundles refused unopened, no words of exceptions, sign-off."""

import hashlib
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import RecordDict

from agssd_core.errors import EngineError
from agssd_core.journal import entries_of, verify_journal
from client import flower_names, launcher
from client.pulling import Door, guarded
from tests.support.enrolled import enrol


def test_this_flower_has_every_name_that_we_rely_on():
    flower_names.require_hooks()


def test_a_flower_without_one_of_them_refuses_the_start(monkeypatch):
    from flwr.supernode import start_client_internal

    monkeypatch.delattr(start_client_internal, "_pull_and_store_message")
    with pytest.raises(EngineError, match=r"_pull_and_store_message.*Install flwr 1\.41"):
        flower_names.require_hooks()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's builder
def test_the_digest_is_that_of_the_bundle_which_flwr_builds(tmp_path):
    from flwr.cli.build import build_fab_from_disk

    from agssd_core.application import application_toml

    (tmp_path / "pyproject.toml").write_text(application_toml())
    built = hashlib.sha256(build_fab_from_disk(tmp_path)).hexdigest()
    assert launcher.application_digest() == built
    (tmp_path / "pyproject.toml").write_text(application_toml("another.app:app"))
    assert hashlib.sha256(build_fab_from_disk(tmp_path)).hexdigest() != built


class Engine:
    """As much of the SuperNode's loop as pulls a message and its bundle."""

    def __init__(self, content):
        self.message = launcher.local_message("train", RecordDict())
        self.fab = SimpleNamespace(content=content)
        self.opened, self.replies = [], []

    def _insert_message(self, reply, _state, _store):
        self.replies.append(reply)

    def pull(self, *, receive, get_fab, **_others):
        message, _ = receive()
        self.opened.append(get_fab(self.named, 1))
        return message.metadata.run_id

    def run(self, named, allowed, journal=None):
        self.named = named
        pull = guarded(self.pull, self, Door(frozenset(allowed), journal))
        return pull(
            receive=lambda: (self.message, None),
            get_fab=lambda *_: self.fab,
            state=None,
            object_store=None,
        )


CONTENT = b"a bundle"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def test_a_bundle_on_the_list_is_taken():
    engine = Engine(CONTENT)
    engine.run(DIGEST, [DIGEST])
    assert (len(engine.opened), engine.replies) == (1, [])


@pytest.mark.parametrize(
    ("content", "named", "allowed"),
    [
        (CONTENT, DIGEST, ["0" * 64]),
        (CONTENT, DIGEST, []),
        (b"another bundle under an allowed name", DIGEST, [DIGEST]),
    ],
)
def test_another_bundle_is_refused_before_anything_opens_it(content, named, allowed):
    engine = Engine(content)
    assert engine.run(named, allowed) is not None
    assert engine.opened == []
    assert [reply.error.reason for reply in engine.replies] == ["declined-policy-code"]


def test_a_refused_bundle_stands_in_the_sites_journal(tmp_path):
    public = enrol(tmp_path)
    Engine(CONTENT).run(DIGEST, [], journal=tmp_path)
    Engine(CONTENT).run(DIGEST, [DIGEST], journal=tmp_path)
    assert verify_journal(tmp_path, public).head[0] == 1
    (entry,) = entries_of(tmp_path)
    assert (entry.kind, entry.facts) == ("refusal", {"reason": "policy-code"})


def test_an_error_reply_says_the_class_and_none_of_the_words():
    try:
        raise ValueError("Doe^John")
    except ValueError:
        error = launcher._plain_error(code=1, reason="<class 'ValueError'>:<'Doe^John'>")
    assert error.reason == "ValueError"


def test_flowers_log_loses_the_words_of_an_exception(caplog):
    logger = logging.getLogger("flwr")
    before = list(logger.filters)
    launcher._without_exception_texts()
    try:
        try:
            raise ValueError("Doe^John")
        except ValueError:
            record = logger.makeRecord("flwr", 40, "", 1, "%s raised", ("App",), sys.exc_info())
        assert logger.filter(record)
        assert "Doe" not in logging.Formatter().format(record)
        assert "ValueError" in logging.Formatter().format(record)
    finally:
        logger.filters[:] = before


GIVES_UP = """
import sys, threading, time
from pathlib import Path
from client import launcher
from flwr.supernode.cli import flower_supernode as engine

class Module:
    @staticmethod
    def flower_supernode():
        threading.Thread(target=time.sleep, args=(120,)).start()

real = launcher._module
launcher._module = lambda name: Module if name.endswith("cli.flower_supernode") else real(name)
launcher.run_node([], allowed=frozenset(), memory=Path(sys.argv[1]))
"""


def test_a_node_that_gave_its_connection_up_ends_so_that_it_is_started_again(tmp_path):
    """Flower's own process would stay, off line, because its HTTP server's thread does."""
    command = [sys.executable, "-c", GIVES_UP, str(tmp_path / "node.id")]
    ended = subprocess.run(command, cwd=Path(__file__).parents[1], timeout=100, check=False)
    assert ended.returncode == 1
