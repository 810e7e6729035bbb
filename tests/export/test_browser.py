"""A real browser draws both graphs, without a question and without the internet."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time

import pytest
import torch

from pytorch_ext import export

pytest.importorskip("onnx")
pytest.importorskip("netron")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.full

SECONDS = 60
DRAWN = "document.body.classList.contains('default') && document.querySelectorAll('#canvas .node').length"
KINDS = (
    "[...document.querySelectorAll('#canvas .node-item-type text')].map(text => text.textContent).join(' ')"
)

# Of the graph what lies around a node of this kind.
SHOW = """
    for (let i = 0; i < 5; i++) document.getElementById('zoom-out-button').click();
    [...document.querySelectorAll('#canvas .node')].find(node => node.textContent.startsWith('%s'))
        .scrollIntoView({block: 'center', inline: 'center'});
"""


class Browser:
    """Chromium by its DevTools protocol, over a pipe: https://chromedevtools.github.io/devtools-protocol/."""

    def __init__(self, folder):
        to, mine = os.pipe()
        back, other = os.pipe()
        self.commands, self.answers = os.fdopen(mine, "wb", 0), os.fdopen(back, "rb")
        # Anything but the loopback interface is unreachable.
        offline = "--host-resolver-rules='MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'"
        flags = f"--headless --no-sandbox --disable-gpu --user-data-dir={folder} {offline}"
        command = f"exec chromium {flags} --remote-debugging-pipe about:blank 3<&{to} 4>&{other}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(to, other), **quiet)
        os.close(to)
        os.close(other)
        self.numbers = itertools.count(1)

    def ask(self, method, session=None, **parameters):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        self.commands.write(
            json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        )
        while True:
            answer = json.loads(self.message())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def message(self):
        text = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        return text

    def open(self, url, width, height):
        target = self.ask("Target.createTarget", url=url, width=width, height=height, newWindow=True)[
            "targetId"
        ]
        return self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def value(self, session, expression, frame=None):
        """In the page, or in a frame of it, which another server may have sent."""
        where = {}
        if frame is not None:
            world = self.ask("Page.createIsolatedWorld", session, frameId=frame)
            where["contextId"] = world["executionContextId"]
        return self.ask("Runtime.evaluate", session, expression=expression, **where)["result"].get("value")

    def frames(self, session):
        tree = self.ask("Page.getFrameTree", session)["frameTree"]
        return [child["frame"]["id"] for child in tree.get("childFrames", ())]

    def screenshot(self, session, file):
        file.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", session)["data"]))

    def close(self):
        self.process.kill()
        self.process.wait()
        self.commands.close()
        self.answers.close()


@pytest.fixture
def browser(tmp_path):
    """Chromium, which is installed where that is allowed and possible."""
    if shutil.which("chromium") is None and shutil.which("apt-get") and os.geteuid() == 0:
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
        subprocess.run(command, capture_output=True, timeout=240, check=False)
    if shutil.which("chromium") is None:
        pytest.skip("there is no chromium (Debian: apt install chromium)")
    with contextlib.closing(Browser(tmp_path / "profile")) as browser:
        yield browser


def wait(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "nothing was drawn"
        time.sleep(0.1)


def test_netron_draws_the_graph_before_and_after(browser, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)
    model = transformers.BertModel(config).eval()
    mask = torch.tensor([[1] * 8, [1] * 4 + [0] * 4])
    example = {"input_ids": torch.arange(16).view(2, 8), "attention_mask": mask}
    with export.view(model, kwargs=example, compare=True, weights=True, browse=False) as shown:
        page = browser.open(shown.url, 1500, 1000)
        wait(lambda: len(browser.frames(page)) == 2)
        for frame, nodes in zip(browser.frames(page), shown.nodes, strict=True):
            wait(lambda frame=frame: browser.value(page, DRAWN, frame))
            drawn = browser.value(page, "document.querySelector('#canvas').textContent", frame)
            for kind in ("Softmax", "Attention", "LayerNormalization", "Gelu"):
                assert drawn.count(kind) == nodes[kind], kind
            browser.value(page, SHOW % ("Attention" if nodes["Attention"] else "Softmax"), frame)
        assert "1 Attention" in browser.value(page, "document.body.innerText")
        picture = tmp_path / "before-and-after.png"  # kept with pytest's last three runs
        browser.screenshot(page, picture)

        weights = browser.open(shown.weights, 1200, 1000)
        wait(lambda: browser.value(weights, "document.readyState") == "complete")
        assert browser.value(weights, "document.querySelectorAll('svg').length") == 3
        assert browser.value(weights, "[...document.images].filter(i => i.naturalWidth > 0).length") == 1
    print(f"screenshot: {picture}")


@pytest.mark.long
def test_netron_draws_a_pt2(browser, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.GELU(), torch.nn.Linear(3, 2))
    made = export.to_pt2(model, torch.ones(4, 2), tmp_path / "m.pt2")
    with export.view(made.path, browse=False) as shown:
        page = browser.open(shown.graphs[0], 900, 900)
        wait(lambda: browser.value(page, DRAWN))
        assert browser.value(page, KINDS).split() == ["linear", "gelu", "linear"]
        assert shown.nodes == [{"linear": 2, "gelu": 1}]
