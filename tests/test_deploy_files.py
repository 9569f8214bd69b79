"""Units and images start commands that exist; the tools that judge them find no fault."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from client.cli import app as site_app
from server.cli import app as server_app

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
COMMANDS = {"agssd-server": server_app, "agssd-site": site_app}


def _require_understood(words):
    """Options and arguments are those of the command; nothing is run."""
    group = typer.main.get_command(COMMANDS[Path(words[0]).name])
    group.commands[words[1]].make_context(words[1], list(words[2:]))


def _setting(unit, name):
    return re.findall(rf"^{name}=(.*)$", unit.read_text(), re.MULTILINE)


def test_there_are_three_units():
    assert [unit.stem for unit in UNITS] == ["agssd-proxy", "agssd-server", "agssd-site"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_starts_what_exists_and_gives_it_little(unit):
    (line,) = _setting(unit, "ExecStart")
    words = shlex.split(line)
    if Path(words[0]).name in COMMANDS:
        _require_understood(words)
        assert _setting(unit, "KillMode") == ["control-group"]
        assert _setting(unit, "RestartSec") == ["20"]
        assert _setting(unit, "CapabilityBoundingSet") == [""]
    assert _setting(unit, "User") == ["agssd"]
    assert _setting(unit, "NoNewPrivileges") == ["yes"]
    assert _setting(unit, "ProtectSystem") == ["strict"]
    assert _setting(unit, "UMask") == ["0077"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_finds_no_fault_in_a_unit(unit, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / unit.name
    # The programs are not where a hospital has them.
    copy.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text()))
    told = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True)
    assert (told.returncode, told.stdout + told.stderr) == (0, "")


def test_images_start_what_exists():
    text = (DEPLOY / "Containerfile").read_text()
    for stage in ("site", "server"):
        part = text.split(f" AS {stage}\n")[1].split("\nFROM ")[0]
        words = [
            word
            for line in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", part, re.MULTILINE)
            for word in json.loads(line)
        ]
        _require_understood(words)
    assert text.count("\nUSER agssd\n") == 2


def test_the_wheelhouse_script_says_how_it_is_used():
    told = subprocess.run([DEPLOY / "wheelhouse.sh"], capture_output=True, text=True)
    assert told.returncode == 2
    assert "pip install --no-index --find-links . agssd-federation" in told.stderr
