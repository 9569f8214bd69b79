"""The coordinator's page from the server alone: the verb, and a serve that writes it."""

from typer.testing import CliRunner

from server.cli import app
from server.report import REPORT_FILE
from server.serve import serve_on_loopback, writing_page
from tests.support.toy import Hospital


def test_the_verb_writes_the_page_of_a_run_as_it_stands(tmp_path):
    hospital = Hospital(tmp_path)
    hospital.run()
    said = CliRunner().invoke(app, ["report", str(hospital.store.folder)])
    assert said.exit_code == 0, said.output
    page = (hospital.store.folder / REPORT_FILE).read_text()
    assert all(f">{name}<" in page for name in hospital.sites)
    assert REPORT_FILE in said.output.replace("\n", "")


def test_a_folder_without_rounds_is_refused_and_gets_no_page(tmp_path):
    said = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert said.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_the_verb_has_help_with_an_example():
    said = CliRunner().invoke(app, ["report", "--help"])
    assert "Example: agssd-server report" in said.output


def test_serving_a_complete_run_leaves_its_page(tmp_path):
    hospital = Hospital(tmp_path)
    hospital.run()
    config = hospital.config.model_copy(update={"name": "run", "output": str(tmp_path)})
    lines = []
    serve_on_loopback(config, say=lines.append)
    assert any("complete" in line for line in lines)
    assert (hospital.store.folder / REPORT_FILE).is_file()


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    hospital = Hospital(tmp_path)
    hospital.run()
    (hospital.store.folder / REPORT_FILE).mkdir()
    config = hospital.config.model_copy(update={"name": "run", "output": str(tmp_path)})
    serve_on_loopback(config, say=str)
    assert "the report could not be written" in caplog.text


def test_the_page_is_whole_and_new_after_every_round(tmp_path):
    hospital = Hospital(tmp_path)
    page = hospital.store.folder / REPORT_FILE
    seen = []

    def look(outcome):
        seen.append(page.read_text())
        assert seen[-1].rstrip().endswith("</html>")

    hospital.run(on_round=writing_page(hospital.store.folder, look))
    assert len(set(seen)) == len(seen) == 3
    assert [text.count("Newest round</") for text in seen] == [1, 1, 1]
    assert not list(hospital.store.folder.glob(".report*"))
