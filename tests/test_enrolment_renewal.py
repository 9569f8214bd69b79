"""Renewed, revoked and expired keys, and commands that were killed on the way."""

import json
import shutil
from dataclasses import asdict

import pytest

from agssd_core.enrolment import Enrolment, EnrolmentRequest
from agssd_core.errors import (
    EnrolmentError,
    JournalError,
    KeyFileError,
    SignatureError,
)
from agssd_core.journal import verify_journal
from agssd_core.signing import SigningKey
from client import enrol as enrol_module
from client.connection import (
    keys_folder,
    load_connection,
    signing_key_file,
)
from client.connection import signing_key as site_signing_key
from client.enrol import accept_answer, enrol, renew
from server import admit as admit_module
from server.admit import admit, revoke
from server.enrolled import active_enrolments, site_keys, waiting_kits
from server.federation_folder import load_federation
from server.provision import provision
from tests.support.enrolling import (
    DAY,
    NOW,
    SECRET,
    enrolled,
    events,
    kit_of,
    provisioned,
    raw_site,
    request_of,
    settings,
    written,
)
from tests.support.killing import Killed, Killer, watched


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("enrol")
    raw_site(folder / "north")
    provisioned(folder / "fed")
    return folder


@pytest.fixture
def north(originals, tmp_path):
    return shutil.copytree(originals / "north", tmp_path / "north")


@pytest.fixture
def fed(originals, tmp_path):
    return shutil.copytree(originals / "fed", tmp_path / "fed")


def test_what_needs_a_kit_says_so(north, fed):
    enrol(north, kit_of(fed, "north"), now=NOW)
    _, answer = admit(request_of(north), fed, now=NOW)
    (keys_folder(north) / "kit.json").unlink()
    with pytest.raises(KeyFileError, match="no kit was opened"):
        accept_answer(north, answer, now=NOW)
    with pytest.raises(KeyFileError, match="the site is not enrolled"):
        renew(north, now=NOW)


@pytest.mark.parametrize("name", ["node-1", "signing-1.pem", ""])
def test_a_key_that_others_can_read_is_refused(north, fed, name):
    enrol(north, kit_of(fed, "north"), now=NOW)
    _, answer = admit(request_of(north), fed, now=NOW)
    file = keys_folder(north) / name
    file.chmod(file.stat().st_mode | 0o044)
    with pytest.raises(KeyFileError, match=r"can be read by others .* Set it to"):
        enrol(north, kit_of(fed, "north"), now=NOW)
    if name:
        with pytest.raises(KeyFileError, match=r"can be read by others"):
            accept_answer(north, answer, now=NOW)


def test_a_renewed_key_follows_and_the_old_one_stays_until_it_ends(north, fed):
    first = enrolled(north, fed)
    later = NOW + 80 * DAY
    renew(north, now=later)
    assert load_connection(north).key_id == 1  # in use until the answer
    second, answer = admit(request_of(north), fed, now=later)
    accept_answer(north, answer, now=later)
    connection = load_connection(north)
    assert (connection.key_id, connection.expires) == (2, second.expires)
    assert second.node_key != first.node_key
    assert active_enrolments(fed, later) == [first, second]
    assert active_enrolments(fed, NOW + 91 * DAY) == [second]
    assert events(north)[-3:] == ["request made", "key renewed", "key in use"]
    for enrolment in (first, second):
        key = SigningKey.load(signing_key_file(north, enrolment.key_id)).public
        assert verify_journal(north, key).head[0] == 5


def test_a_renewal_asked_for_twice_takes_the_answer_to_the_first(north, fed):
    enrolled(north, fed)
    renew(north, now=NOW)
    _, answer = admit(request_of(north), fed, now=NOW)
    renew(north, now=NOW + DAY)
    with pytest.raises(EnrolmentError, match="admitted before"):
        admit(request_of(north), fed, now=NOW + DAY)
    assert accept_answer(north, answer, now=NOW + DAY).key_id == 2


def test_only_the_old_key_renews(north, fed, tmp_path):
    enrolled(north, fed)
    renew(north, now=NOW)
    request = EnrolmentRequest.from_json(request_of(north).read_text())
    thief, new = SigningKey.create(), SigningKey.load(signing_key_file(north, 2))
    for forged in (request.proved_by_key(thief), request.proved_by_token("")):
        file = written(tmp_path / "request.json", forged.signed(new))
        with pytest.raises(SignatureError, match="not that of the enrolled key"):
            admit(file, fed, now=NOW)


@pytest.mark.parametrize("end", ["revoked", "expired"])
def test_a_key_that_ended_renews_nothing_and_a_new_kit_brings_the_site_back(north, fed, end):
    enrolled(north, fed)
    later = NOW + (100 * DAY if end == "expired" else DAY)
    if end == "revoked":
        assert revoke(fed, "north", reason="laptop stolen", now=later) == ((1,), False)
    assert active_enrolments(fed, later) == []
    renew(north, now=later)
    with pytest.raises(EnrolmentError, match=f"key 1 of site north is {end}"):
        admit(request_of(north), fed, now=later)
    provision(settings(), fed, passphrase=lambda _new: SECRET, now=later, again=["north"])
    assert enrolled(north, fed, now=later).key_id == 2
    assert [(key.key_id, key.state) for key in site_keys(fed, later)] == [
        (1, end),
        (2, "active"),
    ]


def test_lost_keys_need_a_new_kit_and_the_old_journal_is_kept(north, fed):
    enrolled(north, fed)
    shutil.rmtree(keys_folder(north))
    provision(settings(), fed, passphrase=lambda _new: SECRET, now=NOW, again=["north"])
    with pytest.raises(JournalError, match=r"move journal\.jsonl to a safe place, keep it"):
        enrol(north, kit_of(fed, "north"), now=NOW)
    (north / "journal.jsonl").rename(north / "journal-1.jsonl")
    assert enrolled(north, fed).key_id == 2


def test_revoking_before_the_kit_is_used_makes_it_void(north, fed):
    enrol(north, kit_of(fed, "north"), now=NOW)
    assert revoke(fed, "north", reason="wrong address", now=NOW) == ((), True)
    assert waiting_kits(fed, NOW)["north"] == "void"
    with pytest.raises(EnrolmentError, match="no kit is open for site north"):
        admit(request_of(north), fed, now=NOW)
    assert provision(settings(), fed, passphrase=lambda _new: SECRET, now=NOW).kits == ()


def test_one_key_is_revoked_alone(north, fed):
    enrolled(north, fed)
    renew(north, now=NOW)
    second, _ = admit(request_of(north), fed, now=NOW)
    assert revoke(fed, "north", reason="old disk", now=NOW, key_id=1) == ((1,), False)
    assert active_enrolments(fed, NOW) == [second]
    assert revoke(fed, "north", reason="old disk", now=NOW, key_id=1) == ((), False)
    with pytest.raises(EnrolmentError, match="site north has no key 7"):
        revoke(fed, "north", reason="x", now=NOW, key_id=7)
    with pytest.raises(EnrolmentError, match="Members: north, south"):
        revoke(fed, "west", reason="x", now=NOW)
    with pytest.raises(EnrolmentError, match="not one line"):
        revoke(fed, "north", reason="a\nb", now=NOW)
    assert events(fed)[-1] == "key revoked"


def test_records_that_were_touched_are_given_to_nobody(north, fed):
    enrolment = enrolled(north, fed)
    file = fed / "enrolled" / "north-1.json"
    longer = asdict(enrolment) | {"expires": "2040-01-01T00:00:00+00:00"}
    for content in (json.dumps(longer), "", "{}", enrolment.to_json()[:-20]):
        file.write_text(content)
        assert active_enrolments(fed, NOW) == []
        assert [key.state for key in site_keys(fed, NOW)] == ["damaged"]


def test_a_revoked_key_does_not_return_under_another_name(north, fed):
    enrolled(north, fed)
    revoke(fed, "north", reason="x", now=NOW)
    for name in ("north-2.json", "south-1.json", "north-01.json", "north-1-1.json"):
        shutil.copy(fed / "enrolled" / "north-1.json", fed / "enrolled" / name)
    assert active_enrolments(fed, NOW) == []


def test_states_follow_the_calendar(north, fed):
    enrolled(north, fed)
    for days, state in [(0, "active"), (75, "active"), (76, "ends soon"), (90, "expired")]:
        assert [key.state for key in site_keys(fed, NOW + days * DAY)] == [state]


def test_enrolments_are_sorted_by_site_and_key(originals, fed, tmp_path):
    names = ("north", "south")
    for name in reversed(names):
        site = shutil.copytree(originals / "north", tmp_path / f"site-{name}")
        enrolled(site, fed, name=name)
        renew(site, now=NOW)
        admit(request_of(site), fed, now=NOW)
    found = [(each.site, each.key_id) for each in active_enrolments(fed, NOW)]
    assert found == [("north", 1), ("north", 2), ("south", 1), ("south", 2)]


def test_killed_anywhere_the_same_commands_finish_the_work(originals, tmp_path, monkeypatch):
    """Enrol, admit, accept, renew, admit, accept; killed at each written file, then repeated."""
    spots = [
        (enrol_module, ("write_bytes", "make_keys", "write_text", "save_connection", "Journal")),
        (admit_module, ("write_text", "void_token", "open_journal")),
    ]
    calls = [(owner, name, getattr(owner, name)) for owner, names in spots for name in names]
    for at in range(1, 99):
        site = shutil.copytree(originals / "north", tmp_path / f"site-{at}")
        fed = shutil.copytree(originals / "fed", tmp_path / f"fed-{at}")
        killer = Killer(at)
        with monkeypatch.context() as patch:
            for owner, name, original in calls:
                patch.setattr(owner, name, watched(original, killer))
            for step in (_first, _second):
                _until_done(step, site, fed)
        assert load_connection(site).key_id == 2
        assert len(active_enrolments(fed, NOW)) == 2
        verify_journal(site, site_signing_key(site, load_connection(site)).public)
        verify_journal(fed, load_federation(fed).key)
        if killer.seen < at:
            break
    assert at > 30


def _first(site, fed):
    enrol(site, kit_of(fed, "north"), now=NOW)
    _admit_and_accept(site, fed, 1)


def _second(site, fed):
    if load_connection(site).key_id == 1:
        renew(site, now=NOW)
    _admit_and_accept(site, fed, 2)


def _admit_and_accept(site, fed, key_id):
    if not (fed / "enrolled" / f"north-{key_id}.json").exists():
        admit(request_of(site), fed, now=NOW)
    accept_answer(site, fed / "enrolled" / f"north-{key_id}.json", now=NOW)


def _until_done(step, site, fed):
    for _ in range(2):
        try:
            return step(site, fed)
        except Killed:
            continue
        except EnrolmentError:
            # The first key was put into use before the end: nothing is left to do.
            assert load_connection(site).key_id == 1
            return _admit_and_accept(site, fed, 1)
    raise AssertionError("not done in two runs")


def test_an_enrolment_is_what_was_agreed(north, fed):
    """Others read this file: its name, and a record that verifies under the pinned key."""
    enrolled(north, fed)
    record = Enrolment.from_json((fed / "enrolled" / "north-1.json").read_text())
    record.verify(load_federation(fed).key)
    assert (record.site, record.key_id, record.federation) == ("north", 1, "lungs")
