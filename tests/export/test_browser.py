"""A real browser draws both graphs, without a question and without the internet."""

import os
import shutil
import subprocess

import pytest
import torch

from pytorch_ext import export

pytest.importorskip("onnx")
pytest.importorskip("netron")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def chromium():
    """The browser, which is installed where that is allowed and possible."""
    if shutil.which("chromium") is None and shutil.which("apt-get") and os.geteuid() == 0:
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
        subprocess.run(command, capture_output=True, timeout=240, check=False)
    if shutil.which("chromium") is None:
        pytest.skip("there is no chromium (Debian: apt install chromium)")
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", offline)

    def run(*arguments):
        command = ["chromium", *flags, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_netron_draws_the_graph_before_and_after(chromium, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)
    model = transformers.BertModel(config).eval()
    example = {"input_ids": torch.arange(16).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    with export.view(model, kwargs=example, compare=True, browse=False) as shown:
        before, after = (chromium("--dump-dom", url) for url in shown.graphs)
        for drawn, nodes in zip((before, after), shown.nodes, strict=True):
            assert "<svg" in drawn
            for kind in ("Attention", "Softmax", "LayerNormalization", "Gelu"):
                assert drawn.count(f">{kind}<") == nodes[kind], kind
        assert "1 Attention" in chromium("--dump-dom", shown.url)
        picture = tmp_path / "after.png"  # kept with pytest's last three runs
        chromium("--window-size=900,1400", f"--screenshot={picture}", shown.graphs[1])
    assert picture.stat().st_size > 20_000
    print(f"screenshot: {picture}")
