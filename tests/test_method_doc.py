"""docs/method.md says what the program does: every default in its tables is compared."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from agssd_core.config import parse_config

METHOD = Path(__file__).parent.parent / "docs" / "method.md"
ROW = re.compile(r"^\| `([a-z_.0-9]+)` \| (.*?) \| (.*?) \| (.*?) \|", re.M)
LISTED = ("agssd", "training.optimiser", "monitor")


def as_written(value):
    if isinstance(value, tuple):
        return ", ".join(as_written(item) for item in value)
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def value_at(node, path):
    for part in path.split("."):
        node = getattr(node, part)
    return node


def leaves(node, prefix):
    for name in type(node).model_fields:
        value = getattr(node, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"


@pytest.mark.parametrize(("column", "preset"), [(2, "small"), (3, "tiny"), (4, "base")])
def test_every_default_in_the_tables_is_the_program_s(column, preset):
    config = parse_config({"preset": preset})
    rows = [match.groups() for match in ROW.finditer(METHOD.read_text())]
    written = {row[0]: row[column - 1] if row[column - 1] != "=" else row[1] for row in rows}
    assert written == {path: as_written(value_at(config, path)) for path in written}


def test_no_setting_is_left_out():
    config = parse_config({})
    expected = {path for part in LISTED for path in leaves(value_at(config, part), part)}
    assert {match[1] for match in ROW.finditer(METHOD.read_text())} == expected
