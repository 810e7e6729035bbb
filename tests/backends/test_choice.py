"""Who is asked for: the context manager over the environment over `auto`, and errors that say everything."""

import asyncio
import os
import subprocess
import sys
import threading

import pytest
import torch

from pytorch_ext import backends, ops
from pytorch_ext.backends import BackendError, _choice, requested, use

x = torch.randn(3, 5)


def test_the_context_manager_wins_and_the_innermost_first(monkeypatch):
    assert requested() == "auto"
    monkeypatch.setattr(_choice, "_from_environment", "reference")
    assert requested() == "reference"
    with use("native"):
        assert requested() == "native"
        with use("auto"):
            assert requested() == "auto"
            with use("reference"):
                assert requested() == "reference"
            assert requested() == "auto"
        assert requested() == "native"
    assert requested() == "reference"


def test_what_was_before_comes_back_after_an_error():
    with use("native"):
        with pytest.raises(RuntimeError, match="on purpose"), use("reference"):
            raise RuntimeError("on purpose")
        assert requested() == "native" == _choice._scoped_for_dynamo
    assert requested() == "auto" and _choice._scoped_for_dynamo is None


def test_one_instance_may_be_used_again_and_inside_itself():
    scope = use("reference")
    for _ in range(2):
        with scope, use("native"), scope:
            assert requested() == "reference"
    assert requested() == "auto" and _choice._open == []


def test_each_thread_has_its_own():
    inside, seen = threading.Barrier(2), {}

    def run(name):
        with use(name):
            inside.wait()
            seen[name] = requested()
            inside.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("reference", "native")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"reference": "reference", "native": "native"}
    with use("reference"):
        fresh = []
        thread = threading.Thread(target=lambda: fresh.append(requested()))
        thread.start()
        thread.join()
    assert fresh == ["auto"]


def test_each_asyncio_task_has_its_own():
    async def run(name):
        with use(name):
            await asyncio.sleep(0)
            return requested()

    async def both():
        return await asyncio.gather(run("reference"), run("native"))

    assert asyncio.run(both()) == ["reference", "native"]


def test_threads_that_leave_in_any_order_leave_nothing_to_compiled_code():
    """The one that entered first leaves first: then what it found must not come back over the other's."""
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first():
        with use("reference"):
            first_in.set()
            second_in.wait()
        first_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    first_in.wait()
    with use("native"):
        second_in.set()
        first_out.wait()
        assert _choice._scoped_for_dynamo == "native"
    thread.join()
    assert _choice._scoped_for_dynamo is None


@pytest.mark.parametrize("name", ["metal", "", "Native", None, 3])
def test_a_name_that_does_not_exist(name):
    with pytest.raises(ValueError, match=r"name: expected one of auto, reference, native, .*, got"):
        use(name)


def test_a_named_backend_is_used_or_every_reason_is_listed(gpu, cuda_tensor):
    gpu("sm_75")
    with use("cuda"), pytest.raises(BackendError) as caught:
        backends.choose("linear", cuda_tensor(torch.float64), x)
    assert str(caught.value) == (
        "linear: backend 'cuda' cannot be used: it runs on cuda tensors, and one is on cpu; it needs compute capability"
        " 8.0 or later, and this GPU has 7.5; it has no kernels for torch.float64"
    )


@pytest.mark.parametrize("name", [n for n in backends.names() if n not in backends.available()])
def test_a_backend_that_is_not_there(name):
    with use(name), pytest.raises(BackendError, match=f"gelu: backend '{name}' cannot be used: .+"):
        ops.gelu(x)


def test_a_transform_is_one_more_reason(gpu, cuda_tensor):
    gpu("sm_75")
    with use("cuda"), torch.autograd.forward_ad.dual_level(), pytest.raises(BackendError) as caught:
        backends.choose("gelu", cuda_tensor())
    assert "has 7.5; functorch transforms and forward-mode AD need the backend native" in str(caught.value)


@pytest.mark.parametrize("name", backends.available())
def test_a_named_backend_runs(name):
    if backends.why_not(name, "gelu", x):
        pytest.skip("; ".join(backends.why_not(name, "gelu", x)))
    with use(name):
        torch.testing.assert_close(ops.gelu(x), torch.nn.functional.gelu(x))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_use_inside_a_function(compiled):
    def function(x):
        with use("reference"):
            inner = requested()
            y = ops.gelu(x)
        return y, inner, requested()

    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    y, *names = function(x)
    assert names == ["reference", "auto"] and requested() == "auto"
    torch.testing.assert_close(y, torch.nn.functional.gelu(x))


def test_compiled_code_goes_by_use_and_by_the_environment(monkeypatch):
    torch._dynamo.reset()
    function = torch.compile(lambda: (x + 1, requested()), fullgraph=True, backend="aot_eager")
    assert function()[1] == "auto"
    with use("reference"):
        assert function()[1] == "reference"
        with use("native"):
            assert function()[1] == "native"
        assert function()[1] == "reference"
    monkeypatch.setattr(_choice, "_from_environment", "native")
    assert function()[1] == "native"


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"import torch, pytorch_ext\nfrom pytorch_ext import backends\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_the_environment_variable():
    code = "print(backends.requested(), backends.choose('gelu', torch.ones(3)))"
    assert in_a_new_process(code, PYTORCH_EXT_BACKEND="reference").stdout.split() == ["reference"] * 2


@pytest.mark.full
def test_nonsense_in_the_environment_variable():
    """The import works, and an op says what is wrong; so does the report, which does not fail."""
    code = "from pytorch_ext.info import report; print(report()); pytorch_ext.ops.gelu(torch.ones(3))"
    done = in_a_new_process(code, PYTORCH_EXT_BACKEND="nonsense")
    assert "nonsense, which is no backend" in done.stdout and done.returncode != 0
    names = ", ".join(backends.names())
    assert f"ValueError: PYTORCH_EXT_BACKEND: expected one of auto, {names}, got 'nonsense'" in done.stderr
