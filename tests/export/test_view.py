"""Netron on the graph before and after, and a sentence where there is nothing to show."""

import re
import socket
import urllib.request

import pytest
from typer.testing import CliRunner

from pytorch_ext import export
from pytorch_ext.cli import app

pytest.importorskip("onnx")
pytest.importorskip("netron")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)
    return transformers.BertModel(config).eval()


@pytest.fixture(scope="module")
def example(model):
    return {"input_ids": model.dummy_inputs["input_ids"] % 50}


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read().decode()


def test_before_and_after(model, example):
    with export.view(model, kwargs=example, compare=True, browse=False) as shown:
        before, after = shown.nodes
        assert not before["Attention"] and before["Softmax"] == 2 and before["MatMul"] > after["MatMul"]
        assert (after["Attention"], after["LayerNormalization"], after["Gelu"]) == (2, 5, 2)
        text = read(shown.url)
        assert all(url in text for url in shown.graphs) and "2 Attention" in text
        for url in shown.graphs:
            assert url.startswith("http://127.0.0.1:")
            assert "netron" in read(url).lower()
        assert type(model.encoder).__name__ == "BertEncoder", "the model itself is left alone"
    with pytest.raises(OSError):
        read(shown.url)


def test_a_file(model, example, tmp_path):
    made = export.to_onnx(model, (), tmp_path / "m.onnx", kwargs=example, check_outputs=False)
    with export.view(made.path, browse=False) as shown:
        assert shown.nodes == [made.nodes]
        assert re.search(r"<iframe src=.http://127", shown._repr_html_())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.onnx"], "there is no file nowhere.onnx"),
        (["text.onnx"], "text.onnx is no ONNX model"),
        (["nowhere"], "there is no folder nowhere"),
        (["text.onnx", "--compare"], "compare: expected a module"),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.onnx").write_text("not a model")
    done = CliRunner().invoke(app, ["view", "--no-browser", *arguments])
    assert done.exit_code == 2
    assert message in done.output and "\n" not in done.output.strip()


def test_a_port_in_use(model, example):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(export.ExportError, match=f"port: {port} is in use"):
            export.view(model, kwargs=example, port=port, browse=False)
