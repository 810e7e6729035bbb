"""What the tests of the ops share: which backends they run on, and `cases.py` for `test_every_op_*`.

A test that takes ``backend`` runs on every backend that can run its module's ``OP`` here, one that takes
``kernel_backend`` on all of them but ``native``; a new backend gets all of it by being there.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pytorch_ext import backends
from pytorch_ext.ops import _direct
from pytorch_ext.testing import SEEDS, assert_contract

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# What the attention of csrc/cuda takes; all of its own tests are in tests/cuda_host/test_attention.py.
CUDA_DTYPES, CUDA_HEADS = (torch.bfloat16, torch.float16), (32, 64, 96, 128)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _cases() -> list:
    spec = importlib.util.spec_from_file_location("cases_of_ops", Path(__file__).with_name("cases.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # the compiler looks for it there
    spec.loader.exec_module(module)
    return module.CASES


CASES = _cases()


def _able(op: str) -> list[str]:
    return [name for name in backends.available() if not backends.why_not(name, op)]


def _for(name: str, case):
    """The case in a size and a dtype that the backend takes."""
    if name != "cuda" or "attention" not in case.op:
        return case
    dtype = {"dtype": CUDA_DTYPES[0]} if hasattr(case, "dtype") else {}
    return dataclasses.replace(case, make=functools.partial(case.make, dim=CUDA_HEADS[0]), **dtype)


def _of_cuda_attention(item: pytest.Item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if "cuda" not in (params.get("backend"), params.get("kernel_backend")):
        return False
    return "attention" in (params["case"].op if "case" in params else item.module.OP)


def _attention_takes(item: pytest.Item) -> bool:
    """Whether it is in a size and a dtype that the attention of csrc/cuda takes."""
    params = item.callspec.params
    case = params.get("case")
    dtype = params.get("dtype", getattr(case, "dtype", None))
    sized = case is not None or (params.get("dim") in CUDA_HEADS and "value_dim" not in params)
    return dtype in CUDA_DTYPES and sized


def _marked(*values, name: str, id: str):
    marks = []
    if name in ("triton", "cuda"):
        marks = [pytest.mark.interpreter if name == "triton" and INTERPRETED else pytest.mark.gpu]
    return pytest.param(*values, marks=marks, id=id)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = getattr(
        metafunc.module, "CASES", CASES
    )  # a module may bring its own, a test run on some of them alone
    cases = [case for case in cases if case.name in getattr(metafunc.function, "cases", case.name)]
    if "case" in metafunc.fixturenames and not {"backend", "kernel_backend"} & set(metafunc.fixturenames):
        metafunc.parametrize("case", [pytest.param(case, id=case.name) for case in cases])
    for argument in ("backend", "kernel_backend"):
        if argument not in metafunc.fixturenames:
            continue
        left_out = "native" if argument == "kernel_backend" else None
        if "case" in metafunc.fixturenames:
            values = [
                _marked(_for(name, case), name, name=name, id=f"{case.name}-{name}")
                for case in cases
                for name in _able(case.op)
                if name != left_out
            ]
            metafunc.parametrize(f"case,{argument}", values)
        else:
            names = [name for name in _able(metafunc.module.OP) if name != left_out]
            metafunc.parametrize(argument, [_marked(name, name=name, id=name) for name in names])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves to ``make test-full`` what Triton's interpreter, and it alone, is too slow for, or to a GPU altogether.

    A test says so by ``full_in_interpreter``, ``long_in_interpreter`` and ``not_in_interpreter``: True, or a function
    of some of its parameters that says of which. And leaves out what the attention of csrc/cuda does not take.
    """
    left_out = {item for item in items if _of_cuda_attention(item) and not _attention_takes(item)}
    for item in items:
        if not item.get_closest_marker("interpreter"):
            continue
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        # One case stands for all of attention, as one kernel does; causality and varlen_attention have their own tests.
        alike = getattr(case, "name", "") in ("causal", "varlen", "varlen_causal")
        if alike or _says(item, "not_in_interpreter"):
            left_out.add(item)
        elif _says(item, "long_in_interpreter"):
            item.add_marker(pytest.mark.long)
            item.add_marker(pytest.mark.full)
        elif _says(item, "full_in_interpreter"):
            item.add_marker(pytest.mark.full)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def _says(item: pytest.Item, name: str) -> bool:
    said = getattr(getattr(item, "function", None), name, False)
    if callable(said):
        wanted = inspect.signature(said).parameters
        said = said(**{name: value for name, value in item.callspec.params.items() if name in wanted})
    return said


# The fixtures below that hand out a function are one for the whole session: hypothesis allows no others.


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads gain nothing on tensors this small, and wait for each other where other work keeps the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def interpreter_looks_once():
    """Triton's interpreter goes through all of its language again each time that a kernel calls a function, for what
    it has not made its own yet. It finds nothing after the first time, and tests took twice as long.
    """
    if not INTERPRETED:
        yield
        return
    import triton.runtime.interpreter as interpreter

    once, seen = interpreter.InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in seen:
            seen.add(id(self.fn.__globals__))
            return once(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    yield
    interpreter.InterpretedFunction.__call__ = once


@pytest.fixture(scope="session", autouse=True)
def large_tiles_of_attention():
    """In the interpreter a tile costs its time whatever its size, and float32 is shipped with the smallest."""
    with contextlib.ExitStack() as stack:
        if INTERPRETED:
            from pytorch_ext.kernels.triton import _attention_configs as configs

            tiles = {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1}
            for table in (configs.FORWARD_AT_ONCE, configs.BACKWARD_AT_ONCE):
                stack.enter_context(table.forced(tiles))
            for table in (configs.FORWARD, configs.BACKWARD_KEYS, configs.BACKWARD_QUERIES):
                stack.enter_context(table.forced({**tiles, "BLOCK_N": 64}))
        yield


@pytest.fixture(autouse=True)
def nothing_compiled_is_left():
    """Dynamo stops after some versions of one function, and a test of each backend makes one more."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" or (backend == "triton" and not INTERPRETED) else "cpu"


@pytest.fixture(scope="session")
def device_of() -> Callable[[str], str]:
    """The device that a backend's tensors are on."""
    return _device_of


def _moved(function: Callable, device: str) -> Callable:
    def call(**tensors):
        result = function(**{name: t.to(device) for name, t in tensors.items()})
        return tuple(t.cpu() for t in result) if isinstance(result, tuple) else result.cpu()

    return call


@pytest.fixture(scope="session")
def check_contract() -> Callable:
    """The numerical contract for one backend, ours and eager PyTorch on its device and float64 on the CPU.

    Gradients are taken outside of ``use``: backward has to know its backend by itself.
    """

    def check(
        backend: str,
        ours: Callable,
        eager: Callable,
        make: Callable,
        dtype: torch.dtype,
        *,
        device: str | None = None,
        **options,
    ) -> None:
        device = device or _device_of(backend)
        if INTERPRETED and max(t.numel() for t in make(torch.Generator().manual_seed(0)).values()) > 100:
            options.setdefault("seeds", SEEDS[:2])  # it is slow, and so many numbers show what they have to

        def on_backend(**tensors):
            with backends.use(backend):
                return ours(**tensors)

        options.setdefault("exact", eager)
        assert_contract(_moved(on_backend, device), _moved(eager, device), make, dtype, **options)

    return check


@pytest.fixture(scope="session")
def inputs_of() -> Callable[..., dict[str, Tensor]]:
    """The inputs of a case on the device of a backend, the floating ones in ``dtype`` or that of the case."""

    def make(case, backend: str, dtype: torch.dtype | None = None, grad: bool = False, seed: int = 0):
        made = case.make(torch.Generator().manual_seed(seed))
        device, dtype = _device_of(backend), dtype or case.dtype
        return {
            name: t.to(device, dtype).requires_grad_(grad) if t.is_floating_point() else t.to(device)
            for name, t in made.items()
        }

    return make


@pytest.fixture
def the_long_way(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets no call be one of a compiled function from now on, until the end of the test."""
    return lambda: monkeypatch.setattr(_direct, "direct_function", lambda name, op: None)


@pytest.fixture
def fixed_rng(monkeypatch: pytest.MonkeyPatch, the_long_way) -> Callable[[int, int], None]:
    """Makes every op draw this seed and offset for its dropout, until the end of the test."""

    def fix(seed: int, offset: int) -> None:
        the_long_way()

        def draw(like: Tensor) -> Tensor:
            return torch.tensor([seed, offset], device=like.device)

        for op in ("attention", "dropout_add_layer_norm", "embedding_layer_norm", "varlen_attention"):
            # By sys.modules: as an attribute of the package the name is the function.
            monkeypatch.setattr(sys.modules[f"pytorch_ext.ops.{op}"], "draw_rng", draw)

    return fix


def _philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's own integers, written from the paper, to hold the kernels' against."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.fixture(scope="session")
def philox() -> Callable[[tuple[int, ...], tuple[int, int]], tuple[int, ...]]:
    return _philox


@pytest.fixture(scope="session")
def kept() -> Callable[..., Tensor]:
    """Which elements dropout keeps, element by element from the definition: one draw for each position.

    ``positions`` gives for each element the column and the two middle words of its counter.
    """

    def mask(seed: int, offset: int, dropout_p: float, positions: Iterator[tuple[int, int, int]]) -> Tensor:
        key = seed % 2**32, (seed >> 32) % 2**32
        words = [_philox((col >> 2, x, y, offset % 2**32), key)[col & 3] for col, x, y in positions]
        return torch.tensor([word >= round(dropout_p * 2**32) for word in words])

    return mask
