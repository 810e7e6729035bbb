"""Which backends there are, what they say of themselves, and what they say when they cannot."""

import importlib.util
import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pytorch_ext import backends, ops
from pytorch_ext.backends import _registry, cpu, cuda, triton

OPS = _registry.ops()


def test_names_in_their_order():
    assert backends.names()[:5] == ("reference", "native", "cpu", "triton", "cuda")


@pytest.mark.parametrize("name", backends.names())
def test_every_backend_holds_what_the_package_says(name):
    backend = _registry.backend(name)
    assert isinstance(backend.DESCRIPTION, str) and "\n" not in backend.DESCRIPTION
    assert all(callable(kernel) for kernel in backend.kernels().values())
    reasons = backend.why_not("gelu")
    assert isinstance(reasons, list) and all(isinstance(reason, str) for reason in reasons)


def test_reference_and_native_have_every_op():
    public = set(ops.__all__) - {"pad_input", "unpad_input"}
    assert set(OPS) == public
    assert set(_registry.backend("reference").kernels()) == {
        f"{op}_{way}" for op in public for way in ("fwd", "bwd")
    } | {"encoder_layer_fwd"}  # for inference, and for those who have it whole


@pytest.mark.parametrize("op", OPS)
def test_native_takes_the_arguments_of_the_public_function(op):
    """Their names and order; what only a kernel needs, and what the wrapper has dealt with, may be missing."""
    public = list(inspect.signature(getattr(ops, op)).parameters)
    native = list(inspect.signature(_registry.kernel("native", op)).parameters)
    assert native == sorted((name for name in public if name in native), key=native.index)
    assert set(public) - set(native) <= {"training", "enable_gqa"}


def test_available():
    found = backends.available()
    assert found[:2] == ["reference", "native"]
    for name in backends.names():
        assert (name in found) == any(not backends.why_not(name, op) for op in OPS)


def test_tensors_that_are_not_there_are_left_out():
    assert backends.why_not("native", "gelu", torch.empty(3), None) == []


def test_a_backend_without_the_op_says_so(gpu, cuda_tensor, monkeypatch):
    gpu("sm_90")
    monkeypatch.setattr(triton, "kernels", lambda: {"gelu_fwd": print, "gelu_bwd": print})
    assert backends.why_not("triton", "gelu", cuda_tensor()) == []
    [reason] = backends.why_not("triton", "linear", cuda_tensor())
    assert reason == "this version has no kernel for linear in this backend"


def test_every_reason_is_listed(gpu, cuda_tensor):
    gpu("sm_75")
    reasons = backends.why_not("cuda", "gelu", cuda_tensor(), torch.empty(3, dtype=torch.float64))
    assert reasons == [
        "it runs on cuda tensors, and one is on cpu",
        "it needs compute capability 8.0 or later, and this GPU has 7.5",
        "it has no kernels for torch.float64",
    ]


@pytest.mark.parametrize(
    ("built", "runs", "does_not"),
    [
        ("sm_80", "sm_80 sm_86 sm_89", "sm_75 sm_90"),
        ("sm_86, sm_90a", "sm_86 sm_89 sm_90", "sm_80 sm_100"),
        ("sm_80, sm_90, PTX of 90", "sm_80 sm_90 sm_100 sm_120", "sm_75"),
    ],
)
def test_a_library_for_other_gpus(built, runs, does_not, gpu, cuda_tensor, monkeypatch):
    for architecture in f"{runs} {does_not}".split():
        gpu(architecture)
        monkeypatch.setattr(cuda, "architectures", lambda: built)
        reasons = backends.why_not("cuda", "gelu", cuda_tensor())
        expected = f"was built for {built}, and this GPU is {architecture}"
        assert any(expected in reason for reason in reasons) == (architecture in does_not.split()), (
            architecture
        )


def test_rows_that_do_not_fit_in_registers(gpu):
    gpu("sm_90")
    with FakeTensorMode():
        x = torch.empty(2, 3, cuda.WIDEST, device="cuda:0")
        weight = torch.empty(3, cuda.WIDEST, device="cuda:0")
    assert backends.why_not("cuda", "layer_norm", x) == []
    assert backends.why_not("cuda", "gelu", weight.view(-1)) == []
    [reason] = backends.why_not("cuda", "layer_norm", x, weight)
    assert reason == f"its rows have at most {cuda.WIDEST} elements, and these have {3 * cuda.WIDEST}"


def test_without_a_gpu(forget_facts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("triton", "cuda"):
        assert "there is no CUDA device that PyTorch can use" in backends.why_not(name, "gelu")
        assert name not in backends.available()


def test_without_triton(forget_facts, monkeypatch):
    monkeypatch.setattr(triton, "_installed", lambda: False)
    assert triton.kernels() == {}
    assert "the package triton is not installed" in backends.why_not("triton", "gelu")[0]


@pytest.mark.parametrize(("backend", "library"), [(cpu, "pytorch_ext._cpu"), (cuda, "pytorch_ext._cuda")])
def test_without_a_compiled_library(backend, library, monkeypatch):
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is built")
    [first, *_] = backend.why_not("gelu")
    assert first == f"the compiled library {library} is not in this installation"


def test_the_cpu_backend_wants_cpu_tensors(cuda_tensor):
    assert "it runs on cpu tensors, and one is on cuda" in backends.why_not("cpu", "gelu", cuda_tensor())


def test_ids_and_masks_have_no_dtype_that_matters():
    assert (
        backends._requirements.dtypes((torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)))
        == []
    )


def test_explain_says_it_of_all():
    x = torch.randn(3)
    lines = backends.explain("gelu", x).splitlines()
    assert lines[0] == f"gelu: {backends.choose('gelu', x)} (asked for: auto)"
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(backends.names())
    assert "  native: can run this" in lines
    for name in backends.names():
        reasons = backends.why_not(name, "gelu", x)
        assert f"  {name}: {'; '.join(reasons) or 'can run this'}" in lines


def test_explain_what_was_asked_for_in_vain(gpu, cuda_tensor):
    gpu("sm_75")
    with backends.use("cuda"):
        head, *rest = backends.explain("gelu", cuda_tensor()).splitlines()
    assert head == (
        "gelu: backend 'cuda' cannot be used: it needs compute capability 8.0 or later, and this GPU has 7.5"
    )
    assert len(rest) == len(backends.names())


def test_explain_an_op_that_is_not_there():
    with pytest.raises(ValueError, match=r"op: expected one of bias_gelu, .*, got 'softmax'"):
        backends.explain("softmax")
