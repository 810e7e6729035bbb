"""What `auto` takes, on the CPU and on each GPU from sm_75 to sm_120."""

import re
from pathlib import Path

import pytest
import torch

from pytorch_ext import backends, ops

DOCUMENT = Path(__file__).parents[2] / "docs/backends.md"
ROW = re.compile(r"^\| (sm_\d+) \| [^|]+ \| ([^|]+) \| `(\w+)` \|$", re.MULTILINE)
TABLE = {
    name: (re.findall(r"`(\w+)`", may_run), takes)
    for name, may_run, takes in ROW.findall(DOCUMENT.read_text())
}
OPS = backends._registry.ops()
REAL = dict(backends._auto.FASTEST)


def test_the_table_in_the_document_is_read():
    expected = [f"sm_{n}" for n in (75, 80, 86, 87, 89, 90, 100, 103, 110, 120)]
    assert list(TABLE) == expected


@pytest.mark.parametrize("architecture", TABLE)
def test_every_gpu_gets_what_the_document_says(architecture, gpu, cuda_tensor):
    gpu(architecture)
    may_run, takes = TABLE[architecture]
    x = cuda_tensor()
    for op in OPS:
        assert [name for name in backends.names() if not backends.why_not(name, op, x)] == may_run
        assert backends.choose(op, x) == takes


@pytest.mark.parametrize("architecture", TABLE)
def test_a_row_counts_on_its_own_architecture_alone(architecture, gpu, cuda_tensor, fastest):
    gpu(architecture)
    fastest["gelu", "sm_90"] = "triton"
    fastest["gelu", "cpu"] = "reference"
    fastest["linear", architecture] = "cuda"
    assert backends.choose("gelu", cuda_tensor()) == ("triton" if architecture == "sm_90" else "native")
    # sm_75 has its row here too, but the kernels need sm_80: auto steps back, in silence.
    assert backends.choose("linear", cuda_tensor()) == ("native" if architecture == "sm_75" else "cuda")
    assert backends.choose("gelu", torch.empty(3)) == "reference"
    assert backends.choose("layer_norm", cuda_tensor()) == "native"


def test_every_row_names_what_exists():
    for (op, device), name in REAL.items():
        assert f"{op}_fwd" in backends._registry.backend("reference").kernels() and name in backends.names()
        assert device == "cpu" or device in TABLE
    assert backends._auto.WORTHWHILE.keys() <= REAL.keys()
    assert backends._auto.COMPILED_INFERENCE.keys() <= REAL.keys()
    assert set(backends._auto.COMPILED_INFERENCE.values()) <= set(backends.names())


def test_auto_steps_back_where_the_fastest_cannot_run(gpu, cuda_tensor, fastest):
    gpu("sm_90")
    fastest["layer_norm", "sm_90"] = "triton"
    assert backends.choose("layer_norm", cuda_tensor()) == "triton"
    assert backends.choose("layer_norm", cuda_tensor(torch.float64)) == "native"
    assert backends.choose("layer_norm", cuda_tensor(), torch.empty(5), None) == "native"


def test_what_auto_takes_runs(fastest, monkeypatch):
    fastest["gelu", "cpu"] = "reference"
    ran = []
    original = backends._registry.kernel
    monkeypatch.setattr("pytorch_ext.ops._raw.kernel", lambda *names: ran.append(names) or original(*names))
    x = torch.randn(3, requires_grad=True)
    ops.gelu(x).sum().backward()
    assert ran == [("reference", "gelu_fwd"), ("reference", "gelu_bwd")]


def test_a_row_counts_from_a_size_on(fastest, monkeypatch):
    fastest["gelu", "cpu"] = "reference"
    monkeypatch.setitem(backends._auto.WORTHWHILE, ("gelu", "cpu"), 10)
    assert [backends.choose("gelu", torch.empty(n)) for n in (1, 9, 10)] == ["native", "native", "reference"]
    assert backends.choose("gelu", torch.empty(0)) == "reference", "as a report asks"


def test_without_measurements_native(fastest):
    assert {backends.choose(op, torch.empty(3)) for op in OPS} == {"native"}


def test_compiled_inference_takes_what_is_faster_there(fastest, monkeypatch):
    fastest["gelu", "cpu"] = fastest["layer_norm", "cpu"] = "reference"
    monkeypatch.setattr(backends._auto, "COMPILED_INFERENCE", {("gelu", "cpu"): "native"})
    numbers = {name: i for i, name in enumerate(backends.names())}

    def chosen(x):
        return x * 0 + numbers[backends.choose("gelu", x)], x * 0 + numbers[backends.choose("layer_norm", x)]

    torch._dynamo.reset()
    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    found = []
    for function in (chosen, compiled):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                found.append([backends.names()[int(number)] for number in function(torch.ones(1))])
    assert found == [["reference", "reference"]] * 3 + [["native", "reference"]]
