"""The step's benchmark runs, and asserts equality before it times anything."""

import pytest

from benchmarks import bench_agssd


def test_quick_form_runs(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_agssd", "--quick"])
    assert bench_agssd.main() == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("this CPU")]
    assert len(lines) == 2
    assert all("promises nothing" in line for line in lines)


def test_a_step_that_computes_something_else_is_not_timed(monkeypatch):
    def other(*_):
        return lambda: 123.0

    monkeypatch.setattr(bench_agssd, "naive_step", other)
    with pytest.raises(AssertionError, match="losses differ"):
        bench_agssd.against_naive(bench_agssd.naive_cases(quick=True)[0])
