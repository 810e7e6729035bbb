"""What explain says, as text and as data."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import pytorch_ext
from pytorch_ext import backends

CLASSIFIER = "BertForSequenceClassification"


@pytest.fixture
def report(make_pair):
    return lambda name, **kwargs: pytorch_ext.explain(make_pair(name, **kwargs)[1])


def row(report, where):
    (found,) = [r for r in (*report.replaced, *report.left) if r.where == where]
    return found


@pytest.mark.parametrize("family", ["hf", "px"])
def test_what_was_replaced_by_what(report, family):
    found = report(f"{family}.{CLASSIFIER}", backend="reference")
    assert (found.model, found.dry_run, found.backend, found.layout_bytes) == (
        CLASSIFIER,
        False,
        "reference",
        0,
    )
    layers = row(found, "bert.encoder.layer.*")
    assert (layers.count, layers.was, layers.now) == (2, "BertLayer", "FusedBertLayer")
    assert (layers.backend, layers.inside) == ("reference", False)
    encoder = row(found, "bert.encoder")
    assert (encoder.was, encoder.now, encoder.backend) == ("BertEncoder", "PaddingFreeBertEncoder", "")
    norms = row(found, "bert.encoder.layer.*.output.LayerNorm")
    assert (norms.count, norms.was, norms.inside) == (2, "LayerNorm", True)
    activation = row(found, "bert.encoder.layer.*.intermediate.intermediate_act_fn")
    assert activation.count == 2
    assert found.padding == ["bert.encoder: removed where a 2-D mask shows some and position 0 is real"]


@pytest.mark.parametrize("family", ["hf", "px"])
def test_what_was_left_alone(report, family):
    found = report(f"{family}.{CLASSIFIER}")
    left = {r.where: (r.was, r.now, r.note) for r in found.left}
    assert left["classifier"] == ("Linear", "Linear", "no rule for it")
    assert left["bert.pooler.dense"] == ("Linear", "Linear", "no rule for it")
    # What a fused block computes with, and what only holds others, is not worth a line.
    assert not any(where.startswith(("bert.encoder", "bert.embeddings")) or where == "bert" for where in left)


def test_before_optimising(make_model):
    found = pytorch_ext.explain(make_model())
    assert not found.replaced
    assert row(found, "encoder.layer.*").note == "optimize has not been called"
    assert "0 modules replaced" in str(found)


@pytest.mark.parametrize(
    ("fields", "where", "reason"),
    [
        ({"is_decoder": True}, "encoder", "it is a decoder; padding removal is for encoders"),
        ({"chunk_size_feed_forward": 4}, "encoder", "its config chunks the feed-forward block"),
        ({"chunk_size_feed_forward": 4}, "encoder.layer.*", "its config chunks the feed-forward block"),
        (
            {"hidden_act": "gelu_python"},
            "encoder.layer.*.intermediate.intermediate_act_fn",
            "it computes GELU by a formula of its own",
        ),
    ],
)
def test_reasons(make_model, fields, where, reason):
    model = pytorch_ext.optimize(make_model(**fields))
    if "hidden_act" in fields:
        model = model.encoder.layer[0].intermediate.intermediate_act_fn
        where = "(the model itself)"
    assert row(pytorch_ext.explain(model), where).note == reason


def test_padding(make_model):
    def lines(model, **options):
        return pytorch_ext.explain(pytorch_ext.optimize(model, **options)).padding

    model = make_model()
    assert lines(model) == ["encoder: removed where a 2-D mask shows some and position 0 is real"]
    assert lines(model, remove_padding=True) == ["encoder: removed where a 2-D mask shows some"]
    kept = "encoder: kept: optimize was told remove_padding=False"
    assert lines(model, remove_padding=False) == [kept]


def test_padding_of_heads_that_weigh_positions(make_model, make_batch, fused_layers):
    model = make_model("hf.BertForQuestionAnswering")
    line = "bert.encoder: kept: BertForQuestionAnswering weighs all positions against each other, padded ones too"
    assert pytorch_ext.optimize(model, dry_run=True).padding == [line]
    assert pytorch_ext.explain(pytorch_ext.optimize(model)).padding == [line]
    assert fused_layers(model, make_batch().inputs) == 0
    assert (
        pytorch_ext.explain(model).padding[1].startswith("bert.encoder: last forward dense: BertForQuestion")
    )
    pytorch_ext.optimize(model, remove_padding=True)
    assert fused_layers(model, make_batch().inputs) == 2
    with pytorch_ext.optimized(model):
        assert fused_layers(model, make_batch().inputs) == 0
    assert fused_layers(model, make_batch().inputs) == 2


def test_text(make_pair, make_batch):
    _, fast = make_pair(f"hf.{CLASSIFIER}")
    with torch.no_grad():
        fast(**make_batch().inputs)
    found = pytorch_ext.explain(fast)
    text = str(found)
    lines = text.splitlines()
    replaced = sum(r.count for r in found.replaced)
    assert lines[0] == f"{CLASSIFIER}: {replaced} modules replaced; backend auto"
    assert any("2 x" in line and "bert.encoder.layer.*" in line and "native" in line for line in lines)
    assert "bert.encoder: last forward without padding: 25 of 44 positions were real tokens" in text
    assert "laid-out weights: " in text
    assert "left as they are:" in text
    assert max(map(len, lines)) <= 120
    assert all(line == line.rstrip() for line in lines)


def test_data(report):
    found = report(f"hf.{CLASSIFIER}")
    data = found.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["replaced"][0].keys() == {"where", "count", "was", "now", "note", "backend", "inside"}
    assert data["model"] == CLASSIFIER
    assert [choice["backend"] for choice in data["choices"]] == ["native"]
    assert "varlen_attention" in data["choices"][0]["ops"]


def test_backends(make_pair):
    _, fast = make_pair()
    assert row(pytorch_ext.explain(fast), "encoder.layer.*").backend == "native"
    with backends.use("reference"):
        assert row(pytorch_ext.explain(fast), "encoder.layer.*").backend == "reference"
        assert pytorch_ext.explain(fast).backend == "reference"
    with backends.use("cuda"):
        assert "cannot" in row(pytorch_ext.explain(fast), "encoder.layer.*").backend


def choices(model):
    return {(c.backend, c.why): set(c.ops) for c in pytorch_ext.explain(model).choices}


def test_why_a_backend_runs(make_pair, monkeypatch):
    monkeypatch.setattr(backends._auto, "FASTEST", {("linear", "cpu"): "reference", ("gelu", "cpu"): "cuda"})
    _, fast = make_pair()
    found = choices(fast)
    assert found["reference", "the fastest measured here"] == {"linear"}
    assert "varlen_attention" in found["native", "as nothing faster has been proved on this device"]
    ((backend, why),) = [key for key, ops in found.items() if "gelu" in ops]
    assert backend == "native" and why.startswith("as cuda cannot (")
    with backends.use("reference"):
        assert choices(fast).keys() == {("reference", "because it was asked for")}
    _, fast = make_pair(backend="reference")
    with backends.use("native"):
        assert choices(fast).keys() == {("reference", "because optimize was told so")}
    with backends.use("cuda"):
        _, fast = make_pair()
        (backend, why), *_ = choices(fast)
        assert backend == "cuda: cannot" and why
    monkeypatch.setattr(backends._auto, "FASTEST", {("encoder_layer", "cpu"): "cpu"})
    _, fast = make_pair()
    found = choices(fast.float())
    whole = (
        {"encoder_layer"} if backends.offered("encoder_layer", torch.empty(0)) else None
    )  # no other backend has it
    assert found.get(("cpu", "the fastest measured here")) == whole
    assert "encoder_layer" not in found["native", "as nothing faster has been proved on this device"]
    assert choices(nn.GELU()) == {}
    assert choices(pytorch_ext.optimize(nn.GELU())) == {
        ("native", "as no parameter tells the device"): {"gelu"}
    }


def test_equal_layers_are_said_once(make_pair, make_batch):
    texts = []
    for layers in (2, 12):
        _, fast = make_pair(f"hf.{CLASSIFIER}", num_hidden_layers=layers)
        with torch.no_grad():
            fast(**make_batch().inputs)
        texts.append(str(pytorch_ext.explain(fast)).splitlines())
    assert len(texts[0]) == len(texts[1]) <= 25


@pytest.mark.full
def test_no_package_is_needed_to_print_it():
    """It is read where torch alone is installed."""
    code = (
        "import sys; from torch import nn; import pytorch_ext\n"
        "print(pytorch_ext.explain(pytorch_ext.optimize(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))))\n"
        "print(*sorted({'rich', 'transformers', 'tabulate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, modules = done.stdout.splitlines()
    assert modules == ""
    assert lines[0] == "Sequential: 1 modules replaced; backend auto"
    assert lines[1].split() == ["path", "was", "is", "backend"]


def test_a_model_of_one_module():
    found = pytorch_ext.explain(pytorch_ext.optimize(nn.LayerNorm(4)))
    assert row(found, "(the model itself)").was == "LayerNorm"
    assert "1 modules replaced" in str(found)


def test_a_model_with_nothing_to_replace():
    found = pytorch_ext.explain(pytorch_ext.optimize(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    assert not found.replaced
    assert [r.where for r in found.left] == ["*"]
    assert not pytorch_ext.explain(pytorch_ext.optimize(nn.Identity())).left
