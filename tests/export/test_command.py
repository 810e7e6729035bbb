"""``pytorch-ext export``: a file and a sentence, or one sentence and status 2."""

import pytest
import torch
from typer.testing import CliRunner

from pytorch_ext import export
from pytorch_ext.cli import app

pytest.importorskip("onnxruntime")
pytest.importorskip("netron")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoint")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)
    transformers.BertModel(config).save_pretrained(place)
    return place


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2"])
def test_a_checkpoint(folder, tmp_path, name):
    done = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / name)])
    assert done.exit_code == 0, done.output
    assert "largest difference to PyTorch's output" in done.output
    assert [file.name for file in tmp_path.iterdir()] == [name]
    # The file as view reads it: the same counts.
    with export.view(tmp_path / name, browse=False) as shown:
        (nodes,) = shown.nodes
    assert (
        f"{nodes.total()} nodes: " + ", ".join(f"{n} {kind}" for kind, n in nodes.most_common())
        in done.output
    )
    if name.endswith("onnx"):
        assert (nodes["Attention"], nodes["LayerNormalization"], nodes["Gelu"]) == (1, 3, 1)
    else:
        assert nodes["scaled_dot_product_attention"] == 1
        program = torch.export.load(tmp_path / name)
        assert all("pytorch_ext" not in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("nowhere", "m.onnx", "FOLDER: there is no folder"),
        (".", "m.onnx", "holds no checkpoint"),
        (None, "m.txt", "FILE: expected a name that ends in .onnx or .pt2, got m.txt"),
    ],
)
def test_bad_input(folder, tmp_path, monkeypatch, source, name, message):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["export", str(source or folder), name])
    assert done.exit_code == 2
    assert message in done.output and "\n" not in done.output.strip()
    assert not list(tmp_path.iterdir())
