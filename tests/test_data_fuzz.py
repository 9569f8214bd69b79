"""Hostile DICOM files: each is set aside with a reason, the rest goes on, nobody is named."""

import logging
import random
import shutil
import warnings

import pydicom
import pytest

from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.dicom import read_dicom_header, read_pixels
from agssd_core.data.index import index_folders
from agssd_core.data.prepare import prepare_site
from agssd_core.data.quiet import quiet_readers
from agssd_core.errors import DataError
from tests.support.dicoms import PSEUDONYMISER, write_series
from tests.support.sites import FAST

NAME = "Doe-4711"
MUTANTS = 150


def _mutate(content: bytes, draw: random.Random) -> bytes:
    kind = draw.randrange(6)
    spoilt = bytearray(content)
    if kind == 0:
        return bytes(spoilt[: draw.randrange(len(spoilt))])
    if kind == 1:
        return bytes(spoilt[132:])  # no preamble
    if kind == 2:
        start = draw.randrange(len(spoilt) - 64)
        return bytes(spoilt[:start] + spoilt[start + draw.randrange(1, 64) :])
    for _ in range(draw.randrange(1, 40)):  # bytes of the header
        spoilt[draw.randrange(132, 1800)] = draw.randrange(256)
    if kind == 3:
        spoilt[128:132] = b"XXXX"
    return bytes(spoilt)


def test_mutants_are_read_or_refused_without_naming_anybody(tmp_path, caplog, recwarn, capfd):
    caplog.set_level(logging.DEBUG)
    content = write_series(tmp_path / "good", patient=NAME)[0].read_bytes()
    draw, reasons = random.Random(0), []
    file = tmp_path / f"{NAME}.dcm"
    for _ in range(MUTANTS):
        file.write_bytes(_mutate(content, draw))
        try:
            read_dicom_header(file, PSEUDONYMISER)
            read_pixels(file)
        except DataError as error:
            reasons.append(str(error))
    assert len(reasons) > MUTANTS / 4
    said = (
        caplog.text
        + "".join(str(warning.message) for warning in recwarn)
        + "".join(capfd.readouterr())
    )
    for text in (said, *reasons):
        assert NAME not in text
        assert "Phantom" not in text


@pytest.mark.parametrize("spoil", ["cut", "no pixels", "syntax", "non-utf8", "text", "empty"])
def test_one_bad_file_costs_nobody_else(tmp_path, spoil, caplog):
    write_series(tmp_path / "raw" / "good", patient="Roe", seed="2")
    file = shutil.copy(
        write_series(tmp_path / "other", patient=NAME)[0], tmp_path / "raw" / "x.dcm"
    )
    data = pydicom.dcmread(file)
    content = file.read_bytes()
    if spoil == "no pixels":
        del data.PixelData
        data.save_as(file)
    elif spoil == "syntax":
        file.write_bytes(content.replace(b"1.2.840.10008.1.2.1", b"1.2.840.10008.9.9.9"))
    elif spoil == "non-utf8":
        raw = content.replace(b"Phantom^Doe", b"Ph\xff\xfe\xe9m^Doe")
        file.write_bytes(raw)
    else:
        file.write_bytes(
            {"cut": content[:700], "text": b"no DICOM at all " * 40, "empty": b""}[spoil]
        )
    report = index_folders(tmp_path / "site", [tmp_path / "raw"])
    prepared = prepare_site(tmp_path / "site", FAST)
    assert report.volumes == 1
    assert prepared.ready == 1
    items = open_catalogue(tmp_path / "site").skipped
    assert len(items) == 1
    for item in (*items, *report.skipped):
        assert len(item.reason) > 20
        assert NAME not in item.reference + item.reason
    assert NAME not in caplog.text


def test_readers_are_silent_only_while_a_file_is_open(caplog):
    child = logging.getLogger("pydicom.pixels.decoders.base")
    with quiet_readers():
        child.error("Doe^John")
        warnings.warn("Doe^John", stacklevel=1)
    assert not caplog.records
    child.error("spoken")
    assert [record.message for record in caplog.records] == ["spoken"]
