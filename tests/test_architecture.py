"""The shape of the house: file and function lengths, no foreign package under our names."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("agssd_core", "client", "server", "simulation")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path):
    text = path.read_text()
    assert text.count("\n") <= 300
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, functions) and node.end_lineno - node.lineno + 1 > 60
    ]
    assert not long, f"longer than 60 lines: {long}"


@pytest.mark.parametrize("name", PACKAGES)
def test_no_foreign_package_has_our_name(name):
    assert Path(find_spec(name).origin) == ROOT / name / "__init__.py"


def test_print_is_for_commands_and_pickle_for_nobody():
    for path in SOURCES:
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "weights_only=False" not in text, path
