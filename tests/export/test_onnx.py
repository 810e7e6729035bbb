"""Exported files hold standard ops alone, a node per attention, LayerNorm and GELU, and compute what the model does."""

from collections import Counter

import pytest
import torch
from torch import nn

import pytorch_ext
from pytorch_ext import export, models

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TOLERANCE = 2e-6  # 16 roundings of float32 outputs of about 1


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 50, "max_position_embeddings": 32}


def bert() -> nn.Module:
    return models.BertModel(models.BertConfig(**SIZES, **TEXT)).eval()


def hf_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertModel(transformers.BertConfig(**SIZES, **TEXT)).eval()


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=16, patch_size=8)).eval()


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def cnn() -> nn.Module:
    layers = (nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return nn.Sequential(*layers).eval()


def tokens(batch: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# model, positional inputs, inputs by name, nodes of an optimised one
MODELS = {
    "px.BertModel": (bert, (), tokens(), {"Attention": 2, "LayerNormalization": 5, "Gelu": 2}),
    "hf.BertModel": (hf_bert, (), tokens(), {"Attention": 2, "LayerNormalization": 5, "Gelu": 2}),
    "hf.ViTModel": (vit, (pixels(),), {}, {"Attention": 2, "LayerNormalization": 5, "Gelu": 2}),
    "nn.TransformerEncoder": (
        transformer,
        (torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)),),
        {},
        {"Attention": 2, "LayerNormalization": 4, "Gelu": 2},
    ),
    "cnn": (cnn, (pixels(),), {}, {"Attention": 0, "LayerNormalization": 0, "Gelu": 1, "Conv": 1}),
}


@pytest.mark.parametrize(
    "optimised",
    [pytest.param(False, id="as it comes", marks=pytest.mark.full), pytest.param(True, id="optimised")],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_model(name, optimised, tmp_path):
    make, args, kwargs, expected = MODELS[name]
    torch.manual_seed(0)
    model = make()
    if optimised:
        pytorch_ext.optimize(model)
    path = tmp_path / "model.onnx"
    made = export.to_onnx(model, args, path, kwargs=kwargs)

    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert {entry.domain for entry in graph.opset_import} == {""}
    assert len(made.shapes) == 2 and made.difference <= TOLERANCE
    found = Counter(node.op_type for node in graph.graph.node)
    assert found == made.nodes
    if optimised:
        assert {kind: found[kind] for kind in expected} == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx"]


def test_the_textbook_below_the_opset_of_attention(tmp_path):
    made = export.to_onnx(pytorch_ext.optimize(bert()), (), tmp_path / "m.onnx", kwargs=tokens(), opset=18)
    assert not made.nodes["Attention"] and not made.nodes["Gelu"]
    assert made.nodes["Softmax"] == 2 and made.nodes["LayerNormalization"] == 5
    assert made.difference <= TOLERANCE


def test_sizes_that_nobody_saw_in_the_example(tmp_path):
    import onnxruntime

    model = pytorch_ext.optimize(bert())
    export.to_onnx(model, (), tmp_path / "m.onnx", kwargs=tokens())
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    other = tokens(batch=5, length=13)
    found = torch.from_numpy(session.run(None, {name: t.numpy() for name, t in other.items()})[0])
    with torch.no_grad():
        expected = model(**other).last_hidden_state
    real = other["attention_mask"].bool()
    assert torch.allclose(found[real], expected[real], atol=TOLERANCE)


class Liar(nn.Module):
    """Computes another thing when it is traced than when it is called."""

    def forward(self, x):
        return x + 1 if torch.compiler.is_exporting() else x


def test_outputs_that_differ_are_found_and_leave_no_file(tmp_path):
    with pytest.raises(export.ExportError, match="differ"):
        export.to_onnx(Liar(), (torch.ones(2, 3),), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_pt2(tmp_path):
    model = pytorch_ext.optimize(bert())
    made = export.to_pt2(model, (), tmp_path / "m.pt2", kwargs=tokens())
    assert made.difference <= TOLERANCE
    program = torch.export.load(tmp_path / "m.pt2")
    assert all("pytorch_ext" not in str(node.target) for node in program.graph.nodes)


class Untraceable(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda path: export.to_onnx(Untraceable(), (torch.ones(2),), path), export.ExportError, "trace"),
        (
            lambda path: export.to_onnx(bert(), (), path, kwargs={"ids": torch.ones(1)}),
            export.ExportError,
            "ids",
        ),
        (lambda path: export.to_onnx(cnn(), (pixels(),), path, opset=9), ValueError, "opset: expected 18"),
        (lambda path: export.to_onnx("bert", (), path), TypeError, "model: expected"),
        (
            lambda path: export.to_onnx(cnn(), (pixels(),), path / "no" / "m.onnx"),
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
