"""The reliability suite in short, and what it says when something fails."""

import json

import pytest

from faults import __main__ as command
from faults.deployment import close_shared
from faults.suite import Fault, Try, inject

SHORT = [fault for fault in command.all_faults() if fault.short]


def _names(faults):
    return {"argvalues": faults, "ids": [f"row {each.row}: {each.name}" for each in faults]}


@pytest.fixture(scope="module", autouse=True)
def _nothing_left():
    yield
    close_shared()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's builder
@pytest.mark.filterwarnings("ignore:`verify=<str>`:DeprecationWarning")  # Flower's use of httpx
@pytest.mark.federation
@pytest.mark.parametrize("fault", **_names([each for each in SHORT if not each.deploy]))
def test_a_fault_of_the_toy_federation(fault):
    outcome = inject(fault, fault.short)
    assert outcome.met, outcome.failures


@pytest.mark.filterwarnings("ignore:`verify=<str>`:DeprecationWarning")  # Flower's use of httpx
@pytest.mark.deploy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", **_names([each for each in SHORT if each.deploy]))
def test_a_fault_of_the_real_deployment(fault):
    outcome = inject(fault, fault.short)
    assert outcome.met, outcome.failures


def test_every_row_that_is_promised_has_a_fault():
    rows = {fault.row for fault in command.all_faults()}
    assert rows == {*range(1, 12), 13, 14, 17}


def _sound(_folder, tries):
    yield from [Try(passed=True, figures={"s": float(number)}) for number in range(tries)]


def _failing(_folder, tries):
    yield Try(passed=True)
    yield Try(passed=False, detail="the reason")


def _breaking(_folder, tries):
    yield Try(passed=True)
    raise ValueError("broken")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    faults = [
        Fault(1, "sound", _sound, 3),
        Fault(2, "failing", _failing, 2),
        Fault(3, "breaking", _breaking, 4, short=0),
    ]
    monkeypatch.setattr(command, "all_faults", lambda: faults)

    def go(*arguments):
        file = tmp_path / "faults.jsonl"
        monkeypatch.setattr("sys.argv", ["faults", "--json", str(file), *arguments])
        code = command.main()
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return code, capsys.readouterr().out, rows

    return go


@pytest.fixture(autouse=True)
def _logging_stays(monkeypatch):
    monkeypatch.setattr("logging.disable", lambda _level: None)


def test_what_failed_is_printed_kept_and_makes_the_exit_code(run):
    code, said, rows = run()
    assert code == 1
    assert [(row["passed"], row["tried"]) for row in rows] == [(3, 3), (1, 2), (1, 4)]
    assert "3/3  s 0..2 (median 1)" in said
    assert "the reason" in said
    assert "ValueError: broken" in said
    assert said.rstrip().endswith("failed: row 2: failing; row 3: breaking")


def test_rows_are_selected_and_take_the_place_of_their_lines(run, tmp_path):
    run()
    code, said, rows = run("--only", "1", "--tries", "7", "--write", str(tmp_path / "page.md"))
    assert code == 0
    assert "failing" not in said
    assert [row["tried"] for row in rows] == [7, 2, 4]
    page = (tmp_path / "page.md").read_text()
    assert "sound" in page
    assert "9/13 tries of 3 faults passed" in page


def test_the_short_form_leaves_out_what_is_long(run):
    _, said, _ = run("--short")
    assert "breaking" not in said
