"""The cheap launch, with a kernel and a driver that only note down what they are given."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")
from pytorch_ext.kernels.triton import launch as module
from pytorch_ext.kernels.triton.launch import launch, recorded

STREAM = 77


class Kernel:
    """As a ``JITFunction``: what it compiles notes its launches down, and so does the plain way."""

    def __init__(self):
        self.arg_names = ["x_ptr", "y_ptr", "n", "p", "FIRST", "SECOND"]
        self.plain, self.direct = [], []

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.plain.append((grid, args, constants))
            return SimpleNamespace(run=self._run, function="function", packed_metadata="metadata")

        return run

    def _run(self, *args):
        self.direct.append(args)


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    state = SimpleNamespace(device=-1, enter=None, leave=None)
    runtime = SimpleNamespace(
        launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=SimpleNamespace(calls=[])
    )
    monkeypatch.setattr(module, "DIRECT", True)
    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(module.triton, "knobs", SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: state.device, raising=False)
    state.runtime = runtime
    return state


@pytest.fixture
def kernel():
    return Kernel()


def go(kernel, x=None, y=None, n=33, p=0.5, grid=(3, 2), first=8, second=True, **options):
    x = torch.zeros(4) if x is None else x
    launch(kernel, grid, x, y, n, p, SECOND=second, FIRST=first, **options)
    return x


def test_the_second_launch_goes_straight_to_what_was_compiled(kernel):
    x = go(kernel, num_warps=4)
    assert len(kernel.plain) == 1 and not kernel.direct
    go(kernel, x, p=0.25, grid=(5,), num_warps=4)
    assert len(kernel.plain) == 1
    # Grid and stream, Triton's own three, no hooks, pointers as integers, and the constants in their places.
    assert kernel.direct == [
        (5, 1, 1, STREAM, "function", "metadata", None, None, None, x.data_ptr(), None, 33, 0.25, 8, True)
    ]


ALIGNED = torch.zeros(64)


@pytest.mark.parametrize(
    "changes",
    [
        {"x": ALIGNED[1:]},
        {"x": ALIGNED.to(torch.float64)},
        {"x": ALIGNED.to(torch.float16)},
        {"y": ALIGNED},
        {"n": 1},
        {"n": 32},
        {"n": 2**31 + 1},
        {"n": 2**31},
        {"first": 16},
        {"second": False},
        {"num_warps": 8},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_triton_specialises_on_is_compiled_anew(kernel, changes):
    go(kernel, ALIGNED)
    go(kernel, **{"x": ALIGNED, **changes})
    assert len(kernel.plain) == 2 and not kernel.direct
    go(kernel, **{"x": ALIGNED, **changes})
    go(kernel, ALIGNED)
    assert len(kernel.plain) == 2 and len(kernel.direct) == 2


def test_another_number_of_the_same_kind_is_not(kernel):
    for n in (33, 35, 1001, -3):
        go(kernel, ALIGNED, n=n)
    for n in (16, 32, 4096, 0):
        go(kernel, ALIGNED, n=n)
    assert len(kernel.plain) == 2 and [args[11] for args in kernel.direct] == [35, 1001, -3, 32, 4096, 0]


def test_two_kernels_share_nothing(kernel):
    other = Kernel()
    go(kernel, ALIGNED)
    go(other, ALIGNED)
    assert len(kernel.plain) == len(other.plain) == 1


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_sees_every_launch(kernel, driver, hook):
    go(kernel, ALIGNED)
    setattr(driver.runtime, hook, SimpleNamespace(calls=[print]))
    go(kernel, ALIGNED)
    assert len(kernel.plain) == 2 and not kernel.direct


def test_tensors_that_are_not_on_the_current_device(kernel, driver):
    go(kernel, ALIGNED)
    driver.device = 3
    go(kernel, ALIGNED)
    assert len(kernel.plain) == 2 and not kernel.direct


def test_an_argument_that_was_left_to_its_default(kernel):
    """What was compiled wants every constant, so Triton's own way fills it in."""
    for _ in range(2):
        launch(kernel, (1,), ALIGNED, None, 33, 0.5, FIRST=8)
    assert len(kernel.plain) == 2 and not kernel.direct


def test_switched_off(kernel, monkeypatch):
    monkeypatch.setattr(module, "DIRECT", False)
    for _ in range(3):
        go(kernel, ALIGNED)
    assert len(kernel.plain) == 3 and not kernel.direct


@pytest.mark.parametrize(
    ("version", "known"), [("3.5.1", False), ("3.6.0", True), ("3.9.0+git", True), ("3.10.0", False)]
)
def test_an_unknown_triton_launches_by_itself(monkeypatch, version, known):
    monkeypatch.setattr(module.triton, "__version__", version)
    assert module._knows_triton() == known


def test_recorded_launches_are_not_made(kernel):
    with recorded() as outer:
        go(kernel, ALIGNED)
        with recorded() as inner:
            go(kernel, ALIGNED, n=5)
        assert [one.args[2] for one in inner] == [5]
    assert [(one.kernel, one.grid, one.args[2]) for one in outer] == [(kernel, (3, 2), 33)]
    assert not kernel.plain and not kernel.direct
