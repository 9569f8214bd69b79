"""What a run says of privacy: in manifests, beside checkpoints, and on one page."""

import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agssd_core.errors import CheckpointError
from agssd_core.protocol import PROTOCOL_VERSION, UpdateHeader
from server.cli import app
from server.privacy_facts import read_privacy
from server.privacy_report import MARKDOWN, PAGE, write_privacy_report
from server.statements import STATEMENTS_FILE, ledger_head, note_statement, statements_of
from server.store import RunStore
from tests.support.toy import Hospital
from tests.test_admission import STATEMENT
from tests.test_ledger_site import PrivateHospital

VOID = {"area", "br", "hr", "img", "input", "link", "meta"}


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A private run of three sites, trained once."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        PrivateHospital(folder).run()
    return folder / "run"


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of that run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


class _Balanced(HTMLParser):
    """Tags that are opened and not closed, and whether there is any script."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags = [], set()
        self.feed(page)

    def handle_starttag(self, tag, _attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _header(site, privacy):
    text = dict.fromkeys(("run", "cohort", "base_digest", "nonce"), "")
    return UpdateHeader(
        **text,
        protocol=PROTOCOL_VERSION,
        site=site,
        round=0,
        steps=1,
        patient_count=1,
        schema_digest="",
        weights_digest="",
        metrics={},
        privacy=privacy,
    )


def test_every_checkpoint_says_what_each_site_has_spent(folder):
    epsilons = []
    for number in RunStore(folder).rounds()[1:]:
        told = RunStore(folder).load(number).manifest.extra["privacy"]
        assert set(told) == {"a", "b", "c"}
        assert {said["unit"] for said in told.values()} == {"patient"}
        epsilons.append(told["b"]["epsilon"])
    assert epsilons == sorted(set(epsilons))
    assert RunStore(folder).load(0).manifest.extra == {}
    refused = [RunStore(folder).load(n).manifest.extra["refusals"] for n in range(1, 5)]
    assert refused == [{}, {}, {"a": "declined-budget"}, {"a": "declined-budget"}]


def test_the_page_names_every_site_its_epsilon_and_the_largest(folder):
    code = CliRunner().invoke(app, ["privacy-report", str(folder)])
    assert code.exit_code == 0
    text = (folder / MARKDOWN).read_text()
    told = RunStore(folder).latest().manifest.extra["privacy"]
    for name, rounds in {"a": 2, "b": 4, "c": 4}.items():
        assert f"| {name} | {rounds} | {told[name]['epsilon_run']:.3f} |" in text
        assert f"{name} {told[name]['sequence']}:{told[name]['digest']}" in text
    largest = max(said["epsilon"] for said in told.values())
    assert f"The largest epsilon is {largest:.2f} at delta 1e-05" in text
    assert f"the sum of both epsilons, here up to {2 * largest:.2f}" in text
    assert "a declined 2 round(s): its budget was spent." in text
    for words in ("loss", "Not protected", "Who must be trusted", "at 3 of 3 site(s)"):
        assert words in text
    page = (folder / PAGE).read_text()
    parsed = _Balanced(page)
    assert parsed.open == []
    assert "script" not in parsed.tags


def test_a_run_without_privacy_says_plainly_that_there_is_no_guarantee(tmp_path):
    hospital = Hospital(tmp_path)
    hospital.run()
    assert hospital.store.latest().manifest.extra["privacy"] == {"a": {}, "b": {}, "c": {}}
    for file in write_privacy_report(hospital.store.folder):
        text = file.read_text()
        assert "This run gives no differential privacy to anybody." in text
        assert "epsilon" not in text.replace("differential privacy", "").lower()
        assert "3 site(s) (a, b, c)" in text


def test_a_site_without_a_statement_is_named_beside_those_with_one(folder):
    note_statement(folder, _header("c", {}))
    (run,) = read_privacy(folder)
    assert run.unprotected == ("c",)
    assert not run.is_private
    text = write_privacy_report(folder)[0].read_text()
    assert "No guarantee at c:" in text
    assert "| c | 4 | none | none |" in text
    # What was told once stays told.
    note_statement(folder, _header("c", STATEMENT))
    assert statements_of(folder)["c"] == {}


def test_repeatable_noise_protects_nobody_and_is_not_forgotten(folder):
    for name in ("a", "b", "c"):
        weak = STATEMENT | {"noise": "repeatable", "sequence": 90}
        note_statement(folder, _header(name, weak))
        note_statement(folder, _header(name, STATEMENT | {"sequence": 91}))
    text = write_privacy_report(folder)[0].read_text()
    assert "no differential privacy to anybody" in text
    assert "noise could be repeated" in text


def test_a_late_statement_does_not_replace_a_newer_head(tmp_path):
    for number in (3, 5, 4):
        note_statement(tmp_path, _header("a", STATEMENT | {"sequence": number}))
    assert ledger_head(tmp_path, "a") == {
        "population": STATEMENT["population"],
        "sequence": 5,
        "digest": STATEMENT["digest"],
    }
    assert ledger_head(tmp_path, "b") == {}
    (tmp_path / STATEMENTS_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"privacy\.json is damaged"):
        statements_of(tmp_path)


def test_names_and_statements_from_outside_cannot_mark_up_the_page(folder):
    held = statements_of(folder)
    held["<script>|x|"] = STATEMENT | {"accountant": "<b>"}
    (folder / STATEMENTS_FILE).write_text(json.dumps(held))
    for file in write_privacy_report(folder):
        assert "<script>" not in file.read_text()
        assert "<b>" not in file.read_text()
        assert "?script??x?" in file.read_text()


def test_a_simulation_says_that_other_runs_are_not_counted(folder):
    held = {name: said | {"scope": "run"} for name, said in statements_of(folder).items()}
    (folder / STATEMENTS_FILE).write_text(json.dumps(held))
    assert "A simulation" in write_privacy_report(folder)[0].read_text()


def test_a_folder_without_rounds_is_refused(tmp_path):
    found = CliRunner().invoke(app, ["privacy-report", str(tmp_path)])
    assert found.exit_code == 2
