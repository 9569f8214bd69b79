"""From the kit to the connection: what is taken and what is refused."""

import shutil
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
)

from agssd_core.enrolment import EnrolmentRequest
from agssd_core.errors import (
    AgssdError,
    CatalogueError,
    EnrolmentError,
)
from agssd_core.kit import read_kit
from agssd_core.signing import SigningKey
from client.connection import (
    ca_file,
    keys_folder,
    load_connection,
    node_key_file,
    signing_key_file,
)
from client.connection import signing_key as site_signing_key
from client.enrol import accept_answer, enrol
from server.admit import admit
from server.enrolled import active_enrolments, waiting_kits
from server.federation_folder import load_federation
from tests.support.enrolling import (
    DAY,
    NOW,
    enrolled,
    events,
    kit_of,
    provisioned,
    raw_site,
    request_of,
    written,
)


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


def _openssh(key):
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _contents(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: path.read_bytes() for path in files if path.name != ".lock"}


def test_a_site_enrols_and_both_sides_know_the_same(north, fed):
    enrolment = enrolled(north, fed)
    connection = load_connection(north)
    assert (connection.site, connection.key_id, connection.port) == ("north", 1, 8443)
    assert connection.server_key == load_federation(fed).server_key
    assert connection.expires == enrolment.expires == "2030-07-30T12:00:00+00:00"
    assert enrolment.cohorts == {"ct-mr": 2}
    assert active_enrolments(fed, NOW) == [enrolment]
    assert site_signing_key(north, connection).public.text() == enrolment.signing_key
    public = node_key_file(north, 1).with_name("node-1.pub").read_text()
    assert public == enrolment.node_key + "\n"
    assert ca_file(north).read_bytes() == (fed / "ca.crt").read_bytes()
    assert events(north) == ["request made", "key in use"]
    assert events(fed)[-1] == "key admitted"


def test_private_things_stay_at_the_site(north, fed):
    enrolled(north, fed)
    folder = keys_folder(north)
    assert folder.stat().st_mode & 0o777 == 0o700
    token = read_kit(kit_of(fed, "north"))[0].token.encode()
    for name in ("node-1", "signing-1.pem", "connection.json"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    secrets = [
        b"".join((folder / name).read_bytes().splitlines()[1:-1])[40:]
        for name in ("node-1", "signing-1.pem")
    ]
    travels = [*_contents(fed).values(), request_of(north).read_bytes()]
    assert not any(secret in content for secret in secrets for content in travels)
    kept = [*_contents(north).values(), *_contents(fed / "enrolled").values()]
    assert not any(token in content for content in kept)


def test_flower_reads_the_nodes_key(north, fed):
    """As flower-supernode does: OpenSSH form, a NIST curve, no passphrase."""
    enrol(north, kit_of(fed, "north"), now=NOW)
    key = load_ssh_private_key(node_key_file(north, 1).read_bytes(), None)
    assert isinstance(key.curve, ec.SECP384R1)


def test_enrolling_again_before_the_answer_keeps_the_keys(north, fed):
    first = enrol(north, kit_of(fed, "north"), now=NOW)
    second = enrol(north, kit_of(fed, "north"), now=NOW + DAY)
    assert (first.node_key, first.signing_key) == (second.node_key, second.signing_key)
    _, answer = admit(request_of(north), fed, now=NOW + DAY)
    assert accept_answer(north, answer, now=NOW + DAY).key_id == 1


def test_a_request_counts_once(north, fed):
    enrolled(north, fed)
    with pytest.raises(EnrolmentError, match="admitted before; a request counts once"):
        admit(request_of(north), fed, now=NOW)
    (fed / "enrolled" / "north-1.json").unlink()
    with pytest.raises(EnrolmentError, match="no kit is open for site north"):
        admit(request_of(north), fed, now=NOW)


def _signed_again(changes):
    """As one who has the site's new signing key but not the token."""

    def change(request, site):
        key = SigningKey.load(signing_key_file(site, 1))
        return replace(request, **changes).signed(key)

    return change


def _stranger(request, site):
    key = SigningKey.create()
    return replace(request, signing_key=key.public.text()).signed(key)


P256 = _openssh(ec.generate_private_key(ec.SECP256R1()))

ED = _openssh(ed25519.Ed25519PrivateKey.generate())

P384 = _openssh(ec.generate_private_key(ec.SECP384R1()))

EDITED = {
    "count": (lambda r, _site: replace(r, cohorts={"ct-mr": 200}), "signature of this enrolment"),
    "key": (lambda r, _site: replace(r, node_key=P384), "signature of this enrolment"),
    "stranger's keys": (_stranger, "not made with the kit of site north, or was altered"),
    "count, signed": (_signed_again({"cohorts": {"ct-mr": 9}}), "or was altered on its way"),
    "no proof": (_signed_again({"proof": ""}), "or was altered on its way"),
    "odd proof": (_signed_again({"proof": "\ud800"}), "or was altered on its way"),
    "key number": (_signed_again({"key_id": 2}), "or was altered on its way"),
    "curve": (_signed_again({"node_key": P256}), "no EC P-384 key"),
    "kind": (_signed_again({"node_key": ED}), "no EC P-384 key"),
    "comment": (_signed_again({"node_key": P384 + " root@x"}), "no EC P-384 key"),
    "no key": (_signed_again({"node_key": "\ud800"}), "no EC P-384 key"),
    "no signing key": (lambda r, _site: replace(r, signing_key="ed25519:AAAA"), "32 bytes"),
    "federation": (_signed_again({"federation": "hearts"}), "another federation than lungs"),
    "site": (_signed_again({"site": "south"}), "not made with the kit of site south"),
    "no member": (_signed_again({"site": "../north"}), "no member of federation lungs"),
    "cohort": (_signed_again({"cohorts": {"us": 2}}), "may take part in ct-mr"),
    "no cohort": (_signed_again({"cohorts": {}}), "names no cohort"),
    "no patient": (_signed_again({"cohorts": {"ct-mr": 0}}), "no whole number from 1"),
    "truth": (_signed_again({"cohorts": {"ct-mr": True}}), "no request of this version"),
    "many": (_signed_again({"cohorts": {"ct-mr": 10**8}}), "no whole number from 1"),
    "text": (_signed_again({"cohorts": {"ct-mr": "2"}}), "no request of this version"),
    "version": (_signed_again({"protocol": 99}), "speaks protocol 99"),
    "renewal of nothing": (_signed_again({"renews": 1, "key_id": 2}), "not its newest"),
}


@pytest.mark.parametrize(("change", "said"), EDITED.values(), ids=EDITED)
def test_an_edited_request_is_refused_and_nothing_changes(north, fed, tmp_path, change, said):
    enrol(north, kit_of(fed, "north"), now=NOW)
    request = EnrolmentRequest.from_json(request_of(north).read_text())
    file = written(tmp_path / "request.json", change(request, north))
    before = _contents(fed)
    with pytest.raises(AgssdError, match=said):
        admit(file, fed, now=NOW)
    assert _contents(fed) == before


BAD_FILES = {
    "empty": (b"", "is no request of this version"),
    "no text": (b"\xff", "is no request of this version"),
    "answer": (b'{"site": "north"}', "is no request of this version"),
    "large": (b" " * 20_000, "larger than 16384 bytes"),
}


@pytest.mark.parametrize(("content", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_request_is_refused(fed, tmp_path, content, said):
    (tmp_path / "request.json").write_bytes(content)
    with pytest.raises(AgssdError, match=said):
        admit(tmp_path / "request.json", fed, now=NOW)


@pytest.mark.parametrize("kept", ["node-1", "signing-1.pem"])
def test_a_key_is_enrolled_once_in_the_whole_federation(north, fed, tmp_path, kept):
    """A key of north, offered by one who holds the kit of south."""
    enrolled(north, fed)
    south = shutil.copytree(north, tmp_path / "south")
    (south / "journal.jsonl").unlink()
    for file in keys_folder(south).iterdir():
        if file.name != kept:
            file.unlink()
    enrol(south, kit_of(fed, "south"), now=NOW)
    with pytest.raises(EnrolmentError, match="enrolled already, here or at another site"):
        admit(request_of(south), fed, now=NOW)


def test_a_void_token_proves_nothing(north, fed):
    request = enrol(north, kit_of(fed, "north"), now=NOW)
    assert not request.proved_by_token("").has_token("")


def test_an_expired_kit_admits_nobody(north, fed):
    enrol(north, kit_of(fed, "north"), now=NOW)
    assert waiting_kits(fed, NOW) == {"north": "waiting", "south": "waiting"}
    assert waiting_kits(fed, NOW + 30 * DAY)["north"] == "expired"
    with pytest.raises(EnrolmentError, match="kit of site north expired on 2030-05-31"):
        admit(request_of(north), fed, now=NOW + 30 * DAY)


def test_a_site_without_scans_for_its_cohorts_is_told(north, tmp_path):
    fed = provisioned(tmp_path / "us", cohorts=("us",))
    with pytest.raises(CatalogueError, match=r"no scan for what it may take part in \(us\)"):
        enrol(north, kit_of(fed, "north"), now=NOW)
    with pytest.raises(CatalogueError, match="agssd-site index"):
        enrol(tmp_path / "nowhere", kit_of(fed, "north"), now=NOW)
    assert not keys_folder(north).exists()


def test_only_cohorts_of_the_kit_are_told(north, fed, tmp_path):
    both = provisioned(tmp_path / "both", cohorts=("ct-mr", "us"))
    assert enrol(north, kit_of(both, "north"), now=NOW).cohorts == {"ct-mr": 2}


def test_a_kit_of_another_federation_is_refused(north, fed, tmp_path):
    enrolled(north, fed)
    before = _contents(north)
    for other in (
        provisioned(tmp_path / "a", name="hearts"),
        provisioned(tmp_path / "b"),  # the same name, another coordinator
    ):
        with pytest.raises(EnrolmentError, match="kit of federation lungs as north"):
            enrol(north, kit_of(other, "north"), now=NOW)
    with pytest.raises(EnrolmentError, match="kit of federation lungs as north"):
        enrol(north, kit_of(fed, "south"), now=NOW)
    with pytest.raises(EnrolmentError, match="Use `agssd-site renew`"):
        enrol(north, kit_of(fed, "north"), now=NOW)
    assert _contents(north) == before


def _answers(enrolment, key, other):
    changed = replace(enrolment, expires="2040-01-01T00:00:00+00:00")
    ended = replace(enrolment, expires="2030-04-01T00:00:00+00:00")
    return {
        "signature of this enrolment": changed,
        "signature of this": changed.signed(other),
        "does not fit this site's request": replace(enrolment, site="south").signed(key),
        r"request \(key_id\)": replace(enrolment, key_id=2).signed(key),
        r"request \(node_key\)": replace(enrolment, node_key=P384).signed(key),
        "expired on 2030-04-01": ended.signed(key),
    }


def test_an_answer_that_is_not_ours_is_refused(north, fed, tmp_path):
    enrol(north, kit_of(fed, "north"), now=NOW)
    enrolment, _ = admit(request_of(north), fed, now=NOW)
    key = SigningKey.load(fed / "signing.pem")
    before = _contents(north)
    for said, bad in _answers(enrolment, key, SigningKey.create()).items():
        with pytest.raises(AgssdError, match=said):
            accept_answer(north, written(tmp_path / "answer.json", bad), now=NOW)
    for content in (b"", b"\xff", b"[" * 9000):
        (tmp_path / "answer.json").write_bytes(content)
        with pytest.raises(EnrolmentError, match="no answer of this version"):
            accept_answer(north, tmp_path / "answer.json", now=NOW)
    assert _contents(north) == before
