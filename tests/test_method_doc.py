"""The pages of the methods say what the program does: every default in their tables is compared."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from agssd_core.config import parse_config

DOCS = Path(__file__).parent.parent / "docs"
ROW = re.compile(r"^\| `([a-z_.0-9]+)` \| (.*?) \| (.*?) \| (.*?) \|", re.M)
PAGES = {
    "method.md": ("agssd", "training.optimiser", "monitor"),
    "anaus.md": ("anaus", "data.frames"),
}


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


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("column", "preset"), [(2, "small"), (3, "tiny"), (4, "base")])
def test_every_default_in_the_tables_is_the_program_s(page, column, preset):
    config = parse_config({"preset": preset})
    rows = [match.groups() for match in ROW.finditer((DOCS / page).read_text())]
    written = {row[0]: row[column - 1] if row[column - 1] != "=" else row[1] for row in rows}
    assert written == {path: as_written(value_at(config, path)) for path in written}


@pytest.mark.parametrize(("page", "parts"), PAGES.items())
def test_no_setting_is_left_out(page, parts):
    config = parse_config({})
    expected = {path for part in parts for path in leaves(value_at(config, part), part)}
    assert {match[1] for match in ROW.finditer((DOCS / page).read_text())} == expected
