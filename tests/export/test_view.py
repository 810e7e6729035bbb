"""Netron on the graph before and after, the page of weights beside it, and a sentence where nothing can be shown."""

import datetime
import signal
import socket
import subprocess
import sys
import types
import urllib.request
import zipfile

import pytest
from typer.testing import CliRunner

from pytorch_ext import export
from pytorch_ext.cli import app
from pytorch_ext.export import netron
from pytorch_ext.export.samples import Words

onnx = pytest.importorskip("onnx")
pytest.importorskip("netron")
transformers = pytest.importorskip("transformers")


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read().decode()


@pytest.fixture
def file(tmp_path):
    """A graph of one node."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "small", [x], [y])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


@pytest.mark.full
def test_before_and_after_and_the_weights():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)
    model = transformers.BertModel(config).eval()
    asked = {"text": "a sentence of words", "tokenizer": Words(50), "compare": True}
    with export.view(model, browse=False, **asked) as shown:
        before, after = shown.nodes
        assert not before["Attention"] and before["Softmax"] == 1 and before["MatMul"] > after["MatMul"]
        assert (after["Attention"], after["LayerNormalization"], after["Gelu"]) == (1, 3, 1)
        text = read(shown.url)
        assert all(url in text for url in shown.graphs) and "1 Attention" in text
        for url in shown.graphs:
            assert url.startswith("http://127.0.0.1:")
            # Netron shows nothing 180 days after this.
            assert f'<meta name="date" content="{datetime.date.today()}' in read(url)
        assert "weights.html" in text and "a sentence of words" in read(shown.weights)
        assert type(model.encoder).__name__ == "BertEncoder", "the model itself is left alone"
    with pytest.raises(OSError):
        read(shown.url)


def test_in_a_notebook(file, monkeypatch):
    seen = []
    frame = types.SimpleNamespace(display=seen.append, IFrame=lambda url, width, height: url)
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(
        sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell, display=frame)
    )
    monkeypatch.setattr(netron.webbrowser, "open", lambda url: pytest.fail("a browser was opened"))
    with export.view(file) as shown:
        assert seen == [shown.url] and shown.nodes == [{"Relu": 1}]


@pytest.mark.full
def test_ctrl_c_ends_it(file):
    command = [sys.executable, "-m", "pytorch_ext", "view", str(file), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "1 Relu" in process.stdout.readline()
        url = process.stdout.readline().split()[2]
        assert "small.onnx" in read(url)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0 and not process.stderr.read()
    with pytest.raises(OSError):
        read(url)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.onnx"], "there is no file nowhere.onnx"),
        (["text.onnx"], "text.onnx is no ONNX model"),
        (["text.pt2"], "text.pt2 is no .pt2 of torch.export"),
        (["empty.pt2"], "it holds no exported program"),
        (["nowhere"], "one of minilm, bert, vit, transformer, cnn; there is no folder nowhere"),
        (["text.onnx", "--compare"], "compare: expected a module"),
        (["text.onnx", "--weights"], "weights: expected a module"),
        (["cnn", "--text", "a sentence"], "--text: expected a model of tokens, got cnn"),
        (["cnn", "--out", "page.html"], "--out: expected --weights or --text"),
        (["cnn", "--weights", "--out", "no/page.html"], "cannot write to no/page.html"),
        (["cnn", "--port", "TAKEN"], "is in use"),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("text.onnx", "text.pt2"):
        (tmp_path / name).write_text("not a model")
    zipfile.ZipFile("empty.pt2", "w").close()
    before = sorted(tmp_path.iterdir())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        arguments = [port if argument == "TAKEN" else argument for argument in arguments]
        done = CliRunner().invoke(app, ["view", "--no-browser", *arguments])
    assert done.exit_code == 2, done.output
    assert message in done.output and "\n" not in done.output.strip()
    assert sorted(tmp_path.iterdir()) == before
