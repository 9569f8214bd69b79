"""Bytes of real messages keep their promise, and a form that grows breaks it."""

from benchmarks import bench_wire


def test_differences_are_as_small_as_promised(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_wire", "--quick"])
    assert bench_wire.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "x float32 (must" in line]) == 6
    monkeypatch.setattr("agssd_core.differences.BLOCK", 16)
    assert bench_wire.main() == 1
    assert capsys.readouterr().out.count("MISSED") == 2
