"""Exported files hold standard ops alone, a node per attention, LayerNorm and GELU, and compute what the model does."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import pytorch_ext
from pytorch_ext import export, models
from pytorch_ext.backends import portable
from pytorch_ext.export._check import named_outputs
from pytorch_ext.testing import assert_contract, normal, padding_mask

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 50, "max_position_embeddings": 32}


def bert(layers: int = 2) -> nn.Module:
    sizes = SIZES | {"num_hidden_layers": layers}
    return models.BertModel(models.BertConfig(**sizes, **TEXT)).eval()


def hf_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertModel(transformers.BertConfig(**SIZES, **TEXT)).eval()


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=16, patch_size=8)).eval()


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def encoder_and_decoder() -> nn.Module:
    return nn.Transformer(32, 4, 2, 2, 64, activation="gelu", batch_first=True).eval()


def cnn() -> nn.Module:
    layers = (nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return nn.Sequential(*layers).eval()


def tokens(generator: torch.Generator, batch: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (batch, length), generator=generator)
    mask = padding_mask([length, *[length // 2] * (batch - 1)], length)
    return {"input_ids": ids, "attention_mask": mask.long()}


def features(generator: torch.Generator, batch: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    return {"src": normal(generator, batch, length, 32)}


def both_sides(generator: torch.Generator, batch: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    return features(generator, batch, length) | {"tgt": normal(generator, batch, length - 3, 32)}


def pixels(name: str, generator: torch.Generator, batch: int = 2, length: int = 0) -> dict[str, torch.Tensor]:
    return {name: normal(generator, batch, 3, 16, 16)}


# model, inputs, nodes
BERT = {"Attention": 2, "LayerNormalization": 5, "Gelu": 2}
MODELS = {
    "px.BertModel": (bert, tokens, BERT),
    "hf.BertModel": (hf_bert, tokens, BERT),
    "hf.ViTModel": (vit, lambda *args: pixels("pixel_values", *args), BERT),
    "nn.TransformerEncoder": (
        transformer,
        features,
        {"Attention": 2, "LayerNormalization": 4, "Gelu": 2},
    ),
    "nn.Transformer": (
        encoder_and_decoder,
        both_sides,
        {"Attention": 6, "LayerNormalization": 12, "Gelu": 4},
    ),
    "cnn": (
        cnn,
        lambda *args: pixels("input", *args),
        {"Attention": 0, "LayerNormalization": 0, "Gelu": 1, "Conv": 1},
    ),
}


def marked(mark: str, *names: str) -> list:
    return [pytest.param(name, marks=getattr(pytest.mark, mark)) for name in names]


def example(make, generator=None) -> dict[str, torch.Tensor]:
    inputs = make(generator or torch.Generator().manual_seed(0))
    return {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}


def assert_computes(path, model: nn.Module, make) -> None:
    """The file, at a batch and a length of which the export saw nothing, by the contract."""
    session = onnxruntime.InferenceSession(path)
    double = copy.deepcopy(model).double()

    def of(module):
        def call(**inputs):
            with portable(), torch.no_grad():
                output = module(**inputs)
            return tuple(named_outputs(output).values())

        return call

    def ours(**inputs):
        found = session.run(None, {name: t.numpy() for name, t in inputs.items()})
        return tuple(map(torch.from_numpy, found))

    other = lambda generator: make(generator, 3, 5)  # noqa: E731
    assert_contract(ours, of(model), other, torch.float32, gradients=False, exact=of(double))


def assert_a_model(name: str, optimised: bool, tmp_path) -> None:
    make_model, make, expected = MODELS[name]
    torch.manual_seed(0)
    model = make_model()
    if optimised:
        pytorch_ext.optimize(model)
    inputs = example(make)
    args, kwargs = ((), inputs) if "input_ids" in inputs else (tuple(inputs.values()), {})
    path = tmp_path / "model.onnx"
    made = export.to_onnx(model, args, path, kwargs=kwargs)

    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert {entry.domain for entry in graph.opset_import} == {""}
    assert len(made.shapes) == 2
    found = Counter(node.op_type for node in graph.graph.node)
    assert found == made.nodes
    assert {kind: found[kind] for kind in expected} == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx"]
    assert_computes(path, model, make)


@pytest.mark.parametrize(
    "name",
    [
        "hf.BertModel",
        *marked("full", "px.BertModel", "hf.ViTModel", "cnn"),
        *marked("long", "nn.TransformerEncoder", "nn.Transformer"),
    ],
)
def test_an_optimised_model(name, tmp_path):
    assert_a_model(name, True, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "cnn",
        *marked("full", "hf.BertModel"),
        *marked("long", "px.BertModel", "hf.ViTModel", "nn.TransformerEncoder", "nn.Transformer"),
    ],
)
def test_a_model_as_it_comes(name, tmp_path):
    assert_a_model(name, False, tmp_path)


def test_the_textbook_below_the_opset_of_attention(tmp_path):
    model, path = pytorch_ext.optimize(bert(layers=1)), tmp_path / "m.onnx"
    made = export.to_onnx(model, (), path, kwargs=example(tokens), opset=18, check_outputs=False)
    assert not made.nodes["Attention"] and not made.nodes["Gelu"]
    assert made.nodes["Softmax"] == 1 and made.nodes["LayerNormalization"] == 3
    assert_computes(path, model, tokens)


class Liar(nn.Module):
    """Computes another thing when it is traced than when it is called."""

    def forward(self, x):
        return x + 1 if torch.compiler.is_exporting() else x


def test_outputs_that_differ_are_found_and_leave_no_file(tmp_path):
    with pytest.raises(export.ExportError, match="differ"):
        export.to_onnx(Liar(), (torch.ones(2, 3),), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class Pairs(nn.Module):
    """For an even number of examples."""

    def forward(self, x):
        return x if x.shape[0] % 2 == 0 else -x


class Small(nn.Module):
    """Goes one way up to three examples of four, and another beyond."""

    def forward(self, x):
        return -x if x.shape[0] < 4 and x.shape[1] <= 4 else x


class One(nn.Module):
    """For a batch of one alone."""

    def forward(self, x):
        return x.squeeze(0).mm(x.new_ones(9, 2))


def test_sizes_are_free_where_the_model_leaves_them_so(tmp_path):
    file, signal = tmp_path / "m", torch.ones(1, 1, 9)
    made = export.to_onnx(nn.Conv1d(1, 2, 3), signal, file)
    assert made.free == ("batch", "length") and made.shapes == ["(2, 1, 9)", "(3, 1, 8)"]
    assert export.to_pt2(nn.Conv1d(1, 2, 3), signal, file).free == ("batch", "length")
    assert export.to_pt2(nn.Linear(9, 2), signal, file).free == ("batch", "sequence")
    assert export.to_pt2(One(), signal, file).free == ("sequence",)
    made = export.to_onnx(Small(), torch.ones(3, 4, 5), file)  # of which a graph says nothing
    assert made.most == {"batch": 3, "sequence": 4} and made.shapes == ["(3, 4, 5)", "(3, 3, 5)"]
    assert "free sizes: batch (at most 3), sequence (at most 4)" in str(made)
    file.unlink()
    other = r"of \(3, 9\) \(the example's at other sizes; `dynamic` says"
    with pytest.raises(export.ExportError, match=other):
        export.to_pt2(Pairs(), torch.ones(2, 9), file)
    with pytest.raises(export.ExportError, match="dimension 1 of input is 3 and nothing else"):
        export.to_pt2(nn.Conv1d(3, 2, 3), torch.ones(2, 3, 9), file, dynamic={"input": {1: "channels"}})
    assert not list(tmp_path.iterdir())


class Untraceable(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda path: export.to_onnx(Untraceable(), (torch.ones(2),), path), export.ExportError, "trace"),
        (
            lambda path: export.to_onnx(bert(1), (), path, kwargs={"ids": torch.ones(1)}),
            export.ExportError,
            "ids",
        ),
        (
            lambda path: export.to_onnx(cnn(), (torch.ones(1),), path, opset=9),
            ValueError,
            "opset: expected 18",
        ),
        (lambda path: export.to_onnx("bert", (), path), TypeError, "model: expected"),
        (
            lambda path: export.to_onnx(cnn(), (torch.ones(1),), path / "no" / "m.onnx"),
            export.ExportError,
            "path",
        ),
    ],
    ids=["untraceable", "inputs", "opset", "no model", "path"],
)
def test_bad_input_is_one_sentence_and_no_file(call, error, message, tmp_path):
    with pytest.raises(error, match=message) as raised:
        call(tmp_path / "m.onnx")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
