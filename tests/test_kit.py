"""The kit at a site's door: nothing but a small, whole, unexpired kit passes."""

import hashlib
import io
import stat
import zipfile
from dataclasses import replace
from datetime import timedelta

import pytest

from agssd_core.errors import AgssdError, EnrolmentError, KeyFileError, SignatureError
from agssd_core.kit import MAX_MEMBER_BYTES, read_kit, write_kit
from agssd_core.signing import SigningKey
from client.enrol import enrol
from tests.support.enrolling import NOW, kit_of, provisioned


@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    return kit_of(provisioned(tmp_path_factory.mktemp("kit") / "fed"), "north")


def zipped(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def _members(genuine):
    with zipfile.ZipFile(genuine) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def _bomb(members):
    return [("ca.crt", b"0" * 200_000_000), members[1]]


BAD = {
    "surplus": lambda m: [*m, ("run.sh", b"x")],
    "missing": lambda m: m[:1],
    "path": lambda m: [("../ca.crt", m[0][1]), m[1]],
    "absolute": lambda m: [("/etc/ca.crt", m[0][1]), m[1]],
    "bomb": _bomb,
    "no json": lambda m: [m[0], ("kit.json", b"{")],
    "no text": lambda m: [m[0], ("kit.json", b"\xff\xfe")],
    "list": lambda m: [m[0], ("kit.json", b"[]")],
    "deep": lambda m: [m[0], ("kit.json", b"[" * 9000)],
    "fields": lambda m: [m[0], ("kit.json", b'{"site": "north"}')],
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_zip_that_is_no_kit_is_refused(tmp_path, genuine, change):
    path = zipped(tmp_path / "kit.zip", change(_members(genuine)))
    with pytest.raises(AgssdError, match=r"no kit|not hold exactly|not valid JSON|larger"):
        read_kit(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice_is_refused(tmp_path, genuine):
    members = _members(genuine)
    with pytest.raises(EnrolmentError, match=r"exactly ca\.crt and kit.json"):
        read_kit(zipped(tmp_path / "kit.zip", [*members, members[1]]))


def test_a_link_in_the_zip_is_read_as_plain_bytes(tmp_path, genuine):
    members = _members(genuine)
    with zipfile.ZipFile(tmp_path / "kit.zip", "w") as archive:
        link = zipfile.ZipInfo("ca.crt")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr(*members[1])
    kit, ca = read_kit(tmp_path / "kit.zip")
    assert ca == b"/etc/passwd"
    with pytest.raises(EnrolmentError, match="the certificate in the kit is another"):
        kit.verify(ca, now=NOW)


def test_cut_and_flipped_zips_are_refused(tmp_path, genuine):
    whole = genuine.read_bytes()
    for place in range(0, len(whole), 11):
        spoiled = bytearray(whole)
        spoiled[place] ^= 0xFF
        for content in (whole[:place], bytes(spoiled)):
            (tmp_path / "kit.zip").write_bytes(content)
            try:
                kit, ca = read_kit(tmp_path / "kit.zip")
                kit.verify(ca, now=NOW)
            except AgssdError:
                continue
            # A flipped date or attribute in the directory changes nothing that is read.
            assert (kit, ca) == read_kit(genuine)


def test_missing_large_and_special_files_are_refused(tmp_path):
    with pytest.raises(KeyFileError, match="the kit is not there"):
        read_kit(tmp_path / "none.zip")
    with pytest.raises(KeyFileError, match="no plain file"):
        read_kit(tmp_path)
    (tmp_path / "large.zip").write_bytes(bytes(4 * MAX_MEMBER_BYTES))
    with pytest.raises(KeyFileError, match="larger than"):
        read_kit(tmp_path / "large.zip")


def test_an_expired_kit_is_refused(genuine):
    kit, ca = read_kit(genuine)
    kit.verify(ca, now=NOW + timedelta(days=29))
    with pytest.raises(EnrolmentError, match="expired on 2030-05-31"):
        kit.verify(ca, now=NOW + timedelta(days=30))


@pytest.mark.parametrize(
    "field", ["federation", "site", "cohorts", "server", "ca_digest", "token", "expires"]
)
def test_an_edited_kit_is_refused(genuine, field):
    kit, ca = read_kit(genuine)
    with pytest.raises(SignatureError, match="signature of this kit"):
        replace(kit, **{field: getattr(kit, field) + "0"}).verify(ca, now=NOW)


FORGED = {
    "site": {"site": "../north"},
    "server": {"server": "fed.example.org"},
    "port": {"server": "fed.example.org:99999"},
    "key number": {"key_id": 0},
    "date": {"expires": "tomorrow"},
    "version": {"protocol": 99},
}


@pytest.mark.parametrize("changes", FORGED.values(), ids=FORGED)
def test_a_kit_signed_by_its_forger_names_nothing_that_harms(tmp_path, genuine, changes):
    key = SigningKey.create()
    kit, ca = read_kit(genuine)
    forged = replace(kit, server_key=key.public.text(), **changes).signed(key)
    write_kit(tmp_path / "kit.zip", forged, ca)
    with pytest.raises(EnrolmentError, match=r"Ask for the kit|send it again|same version"):
        enrol(tmp_path / "site", tmp_path / "kit.zip", now=NOW)
    assert not (tmp_path / "site").exists()


def test_a_server_certificate_is_no_authority(tmp_path, genuine):
    key = SigningKey.create()
    kit, _ = read_kit(genuine)
    leaf = (genuine.parent.parent / "server.pem").read_bytes()
    digest = hashlib.sha256(leaf).hexdigest()
    forged = replace(kit, server_key=key.public.text(), ca_digest=digest).signed(key)
    write_kit(tmp_path / "kit.zip", forged, leaf)
    with pytest.raises(EnrolmentError, match=r"no authority's|larger"):
        enrol(tmp_path / "site", tmp_path / "kit.zip", now=NOW)


def test_an_encrypted_member_is_refused(tmp_path, genuine):
    content = bytearray(genuine.read_bytes())
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for info in archive.infolist():
            content[info.header_offset + 6] |= 1
    central = bytes(content).find(b"PK\x01\x02")
    while central >= 0:
        content[central + 8] |= 1
        central = bytes(content).find(b"PK\x01\x02", central + 1)
    (tmp_path / "kit.zip").write_bytes(content)
    with pytest.raises(EnrolmentError, match="damaged or no zip"):
        read_kit(tmp_path / "kit.zip")
