"""The overhead benchmark: every op agrees with its native twin, and the table and the record are complete."""

import json

import pytest

from pytorch_ext.benchmarks import bench_overhead, timing


def test_every_op_agrees_with_its_native_twin():
    for case in bench_overhead.cases("cpu"):
        assert bench_overhead.check(case).ok, case.name


@pytest.mark.full
def test_table_and_record(tmp_path, capsys):
    file = tmp_path / "record.json"
    arguments = ["--calls", "2", "--blocks", "3", "--ops", "gelu,layer_norm", "--json", str(file)]
    assert bench_overhead.main(arguments) == 0
    found = json.loads(file.read_text())
    assert [(line["op"], line["mode"]) for line in found["lines"]] == [
        (op, mode) for op in ("layer_norm", "gelu") for mode in ("no grad", "forward", "backward")
    ]
    assert all(line["native_us"] > 0 and line["ours_us"] > 0 for line in found["lines"])
    assert found["limits_us"] == {"no grad": 4.0, "forward": 10.0, "backward": 10.0}
    assert found["environment"]["versions"]["torch"]
    assert "layer_norm" in capsys.readouterr().out


def test_an_op_that_disagrees_gets_no_time(monkeypatch, capsys):
    red = timing.Agreement(1.0, 0.5, 100.0)
    monkeypatch.setattr(bench_overhead, "check", lambda case: red)
    monkeypatch.setattr(bench_overhead, "measure", lambda *_: pytest.fail("timed"))
    assert bench_overhead.main(["--ops", "gelu"]) == 1
    assert "gelu: DISAGREES" in capsys.readouterr().out


def test_bad_input_is_one_sentence(capsys):
    for arguments in (["--ops", "nothing"], ["--backend", "nothing"], ["--calls", "0"]):
        with pytest.raises(SystemExit) as stopped:
            bench_overhead.main(arguments)
        assert stopped.value.code == 2
    assert "no such op: nothing" in capsys.readouterr().err
