"""``pytorch-ext export``: a file and a sentence, or one sentence and status 2."""

import pytest
from typer.testing import CliRunner

from pytorch_ext.cli import app

pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoint")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)
    transformers.BertModel(config).save_pretrained(place)
    return place


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2"])
def test_a_checkpoint(folder, tmp_path, name):
    done = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / name)])
    assert done.exit_code == 0, done.output
    assert "largest difference to PyTorch's output" in done.output
    assert name.endswith("pt2") or "2 Attention" in done.output
    assert [file.name for file in tmp_path.iterdir()] == [name]


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
