"""The benchmark of all families, with models so small that it takes seconds."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from pytorch_ext.benchmarks import bench_families, families

SMALL = ["--hidden", "32", "--layers", "1", "--heads", "2", "--intermediate", "48"]
SMALL += ["--batch", "4", "--seq", "16", "--pairs", "2"]
SHAPE = families.Shape(hidden=32, layers=1, heads=2, intermediate=48, batch=4, seq=16)


def test_the_fill_is_27_percent():
    shape = families.Shape()
    assert sum(shape.lengths) / shape.mask.numel() == pytest.approx(0.27, abs=0.005)
    assert shape.mask.sum(1).tolist() == shape.lengths


SLOW = {"SentenceTransformer": [pytest.mark.full]}  # importing it takes seconds


@pytest.mark.parametrize(
    "family",
    [pytest.param(one, id=one.name, marks=SLOW.get(one.name, [])) for one in families.families()],
)
def test_models_have_equal_weights_and_share_none(family):
    one, other = (family.build(SHAPE) for _ in range(2))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
        assert a.numel() == 1 or a.unique().numel() > 1


@pytest.mark.parametrize("mode", ["infer", pytest.param("train", marks=pytest.mark.full)])
def test_end_to_end_with_a_record(mode, tmp_path, capsys):
    some = ["DistilBert", "ModernBert", "nn.TransformerEncoder"]
    file = tmp_path / "folder" / "record.json"
    assert bench_families.main([*SMALL, "--mode", mode, "--only", ",".join(some), "--save", str(file)]) == 0
    shown = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["mode"] == mode
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert [case["family"] for case in found["cases"]] == some
    for case in found["cases"]:
        assert case["agreement"]["optimized"]["ok"]
        assert case["seconds"]["optimized"] > 0
        assert case["speedup"]["optimized"]["pairs"] == 2
        assert case["padding"].startswith("without padding: ")
        assert case["family"] in shown


def test_a_family_that_disagrees_gets_no_time(monkeypatch, tmp_path, capsys):
    genuine = bench_families.contenders

    def wrong(family, shape, options):
        def build():
            model = made[bench_families.OURS]()
            with torch.no_grad():
                model.transformer.layer[0].ffn.lin2.bias[3] += 0.01
            return model

        made = genuine(family, shape, options)
        return {**made, bench_families.OURS: build}

    monkeypatch.setattr(bench_families, "contenders", wrong)
    file = tmp_path / "record.json"
    assert bench_families.main([*SMALL, "--only", "DistilBert", "--save", str(file)]) == 1
    (case,) = json.loads(file.read_text())["cases"]
    assert not case["agreement"]["optimized"]["ok"]
    assert "seconds" not in case and "speedup" not in case
    assert "no time is shown" in capsys.readouterr().out


def test_a_family_that_breaks_says_why(monkeypatch, capsys):
    def broken(model, backend=None):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(bench_families.pytorch_ext, "optimize", broken)
    assert bench_families.main([*SMALL, "--only", "DistilBert"]) == 1
    assert "DistilBert: optimized: RuntimeError: no such luck" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--only", "Berta"], ["--heads", "5"], ["--pairs", "0"]])
def test_wrong_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        bench_families.arguments([*SMALL, *wrong])
    assert "error:" in capsys.readouterr().err
