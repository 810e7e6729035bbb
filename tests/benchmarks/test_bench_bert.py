"""The end-to-end benchmark, with a BERT so small that it takes seconds."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from pytorch_ext.benchmarks import bench_bert, bert_contenders, timing
from pytorch_ext.benchmarks.contenders import onnx_runtime, torch_nested

SMALL = ["--hidden", "32", "--layers", "1", "--heads", "2", "--intermediate", "64"]
SMALL += ["--batch", "4", "--seq", "16", "--pairs", "2", "--no-compile", "--device", "cpu"]


def case(**changes):
    fields = {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 64, "batch": 4, "seq": 16, "fill": "27"}
    fields |= {"dtype": torch.float32, "mode": "infer", "device": "cpu"}
    return bert_contenders.Case(**fields | changes)


@pytest.mark.parametrize(("fill", "share"), [("27", 0.27), ("60", 0.60), ("sorted", 0.95), ("100", 1.0)])
def test_the_fill_is_what_its_name_says(fill, share):
    lengths = bert_contenders.LENGTHS[fill]
    assert len(lengths) == 16
    assert max(lengths) == 256
    assert sum(lengths) / (16 * 256) == pytest.approx(share, abs=0.005)


def test_inputs_are_a_batch_as_a_tokenizer_makes_it():
    inputs = case().inputs()
    mask = inputs["attention_mask"].bool()
    assert mask.sum(1).tolist() == case().lengths
    assert mask[:, 0].all()
    assert (inputs["input_ids"][~mask] == 0).all()
    assert inputs["input_ids"][mask].unique().numel() > 10  # never constant
    again = case().inputs()
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)


def test_contenders_have_equal_weights_and_share_none():
    one, other = (bert_contenders.hugging_face(case()) for _ in range(2))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
        assert a.unique().numel() > 1  # no bias of zeros, no norm of ones
    assert one.config is not other.config


def test_the_nested_contender_computes_the_same():
    inputs = case().inputs()
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = bert_contenders.hugging_face(case())(**inputs).last_hidden_state[mask]
        got = torch_nested.NestedEncoder(case())(**inputs)[mask]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_end_to_end_with_a_record(mode, tmp_path, capsys):
    file = tmp_path / "folder" / "record.json"
    some = "eager-attention,native" + (",nested" if mode == "infer" else "")
    assert bench_bert.main([*SMALL, "--mode", mode, "--contenders", some, "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["case"]["mode"] == mode
    assert found["case"]["hidden"] == 32
    assert found["case"]["dtype"] == "fp32"
    assert found["baseline"].startswith("eager: Hugging Face default, SDPA")
    assert found["pairs"] == 2
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert found["environment"]["threads"] >= 1
    assert "commit" in found["environment"]
    assert "how_timed" in found["environment"]
    rows = {row["name"]: row for row in found["contenders"]}
    expected = {"eager", "eager-attention", "native"} | ({"nested"} if mode == "infer" else set())
    assert expected <= set(rows)
    for name in expected:
        assert rows[name]["median_seconds"] > 0, rows[name]["note"]
        assert len(rows[name]["seconds"]) == 2
        assert rows[name]["speedup"]["pairs"] == 2
        assert name in shown
    assert rows["native"]["agreement"]["ok"]


def test_a_contender_that_disagrees_gets_no_time(monkeypatch, tmp_path, capsys):
    genuine = bert_contenders.contenders

    def with_a_wrong_one(case):
        def build(case, dropout):
            model = bert_contenders.hugging_face(case)
            with torch.no_grad():
                model.encoder.layer[0].output.dense.bias[3] += 0.01
            return model

        return {**genuine(case), "wrong": ("one bias is off", build)}

    monkeypatch.setattr(bench_bert, "contenders", with_a_wrong_one)
    file = tmp_path / "record.json"
    assert bench_bert.main([*SMALL, "--contenders", "wrong,native", "--json", str(file)]) == 1
    rows = {row["name"]: row for row in json.loads(file.read_text())["contenders"]}
    assert "seconds" not in rows["wrong"] and "speedup" not in rows["wrong"]
    assert not rows["wrong"]["agreement"]["ok"]
    assert rows["native"]["median_seconds"] > 0
    shown = capsys.readouterr().out
    assert "wrong: DISAGREES" in shown
    assert "no time is shown" in shown


def test_a_contender_that_cannot_run_says_why(monkeypatch, capsys):
    def broken(case, dropout):
        raise RuntimeError("no compiler here\nmany more lines")

    genuine = bert_contenders.contenders
    monkeypatch.setattr(bench_bert, "contenders", lambda case: {**genuine(case), "broken": ("", broken)})
    assert bench_bert.main([*SMALL, "--contenders", "broken"]) == 0
    assert "broken: RuntimeError: no compiler here\n" in capsys.readouterr().out


def test_an_error_in_one_gradient_is_red():
    """A key bias has a gradient of pure rounding; another one's error must not hide behind it."""
    training = case(mode="train")
    inputs = training.inputs()
    build = bert_contenders.hugging_face
    truth = bench_bert.outputs(build(training, dtype=torch.float64), training, inputs)
    want = bench_bert.outputs(build(training), training, inputs)
    limits = timing.rounding_limits(want, truth)
    assert bench_bert.agreement(dict(want), want, limits).ok
    for name in ("bert.encoder.layer.0.output.LayerNorm.bias", "classifier.bias", "loss"):
        got = {key: tensor.clone() for key, tensor in want.items()}
        got[name] *= 1.001
        assert not bench_bert.agreement(got, want, limits).ok, name


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--hidden", "33", "--heads", "2"], "no multiple of --heads"),
        (["--pairs", "0"], "--pairs must be at least 1"),
        (["--contenders", "nobody"], "no such contender: nobody"),
        (["--fill", "12"], "invalid choice"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_bert.main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.full
def test_onnx_runtime_fuses_attention_and_agrees():
    model = onnx_runtime.OnnxRuntime(case(layers=2))
    assert model.fused["Attention"] == 2
    assert model.fused["SkipLayerNormalization"] == 4
    inputs = case().inputs()
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = bert_contenders.hugging_face(case(layers=2))(**inputs).last_hidden_state[mask]
    torch.testing.assert_close(model(**inputs)[mask], want, rtol=1e-4, atol=1e-5)


def test_a_vit_is_a_shape_too(tmp_path):
    small = [word for word in SMALL if word != "--seq"]
    small.remove("16")
    file = tmp_path / "record.json"
    words = [*small, "--model", "vit-base", "--contenders", "native", "--json", str(file)]
    assert bench_bert.main(words) == 0
    found = json.loads(file.read_text())
    assert (found["case"]["family"], found["case"]["seq"], found["filled"]) == ("vit", 197, 1.0)
    assert found["contenders"][1]["agreement"]["ok"] and found["contenders"][1]["median_seconds"] > 0
    assert bert_contenders.left_out(case(family="vit"))["nested"] == "it knows bert alone"


def test_another_precision_is_held_to_a_cosine():
    """8 bits err by a hundredth, which rounding in float32 does not explain; what is plainly wrong stays red."""
    draw = torch.Generator().manual_seed(0)
    want = {"hidden states": torch.randn(9, 32, generator=draw)}
    off = lambda by: {"hidden states": want["hidden states"] + by * torch.randn(9, 32, generator=draw)}  # noqa: E731
    limits = {"hidden states": 1e-6}
    assert not bench_bert.agreement(off(0.01), want, limits).ok
    assert bench_bert.coarse(off(0.01), want, limits).ok
    for wrong in (off(0.5), {"hidden states": want["hidden states"].roll(1, 0)}, off(float("nan")), {}):
        assert not bench_bert.coarse(wrong, want, limits).ok
    assert bert_contenders.precision("openvino-int8") == "int8"
    assert bert_contenders.precision("openvino") == ""


def test_who_cannot_run_is_left_out_with_a_reason():
    training = case(mode="train")
    assert bert_contenders.left_out(training)["onnxruntime"] == "it does not train"
    assert bert_contenders.left_out(case())["sdpa-cudnn"] == "it runs on cuda alone"
    assert bert_contenders.left_out(case(dtype=torch.bfloat16))["onnxruntime"].startswith("it computes fp32")
    assert bert_contenders.left_out(case(fill="100"))["cpu-padded"]
    assert next(iter(bert_contenders.contenders(case()))) == "eager"
    usual = bert_contenders.default_names(case())
    assert {"eager", "eager-attention", "compile", "nested", "native"} <= set(usual)
    assert not {"max-autotune", "reference"} & set(usual)
