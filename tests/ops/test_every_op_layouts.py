"""Every op on tensors that lie in memory in unusual ways, outputs and gradients."""

import math
import mmap

import pytest
import torch

FAR = 2**31 + 3  # elements: past what a 32-bit index reaches
MAP_NORESERVE = 0x4000  # Linux: pages count when they are touched


def transposed(t):
    return t.mT.contiguous().mT if t.dim() > 1 else strided(t)


def strided(t):
    return torch.stack([t, t + 1.0], dim=-1)[..., 0] if t.is_floating_point() else t


def expanded(t):
    """Every row the first one: stride 0."""
    return t[:1].expand(t.shape) if t.dim() > 1 and t.is_floating_point() else t


def shifted(t):
    """A view that starts one element into its memory, so on no boundary that vector loads like."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


@pytest.mark.parametrize("layout", [transposed, strided, expanded, shifted], ids=lambda f: f.__name__)
def test_any_layout_of_the_inputs(case, backend, layout, check_contract):
    def of(function):
        return lambda **tensors: function(**{name: layout(t) for name, t in tensors.items()})

    check_contract(backend, of(case.ours), of(case.eager), case.make, case.dtype)


@pytest.mark.parametrize("layout", ["transposed", "stride_0"])
def test_any_layout_of_the_incoming_gradient(case, backend, layout, check_contract):
    def of(function):
        def call(**tensors):
            outs = function(**tensors)
            outs = outs if isinstance(outs, tuple) else (outs,)
            return tuple(t.mT if layout == "transposed" else t.sum(0) for t in outs)

        return call

    check_contract(backend, of(case.ours), of(case.eager), case.make, case.dtype)


class Far(torch.autograd.Function):
    """The same numbers in a large untouched tensor, at offsets past 2**31.

    With ``spread`` the rows lie far from each other, so that an index times a stride is too large; without it the
    whole tensor lies at the far end.
    """

    @staticmethod
    def forward(ctx, t, spread):
        if spread and t.dim() > 1 and t.shape[0] > 1:
            step = math.ceil(FAR / (t.shape[0] - 1))
            strides = (step, *torch.empty(t.shape[1:], device="meta").stride())
            at = untouched(FAR + step, t.dtype).as_strided(t.shape, strides)
        else:
            at = untouched(FAR + t.numel(), t.dtype)[FAR:].view(t.shape)
        return at.copy_(t)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def untouched(count: int, dtype: torch.dtype) -> torch.Tensor:
    # Not torch.empty: tests fill what that allocates, and touch every page of it.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"{count * dtype.itemsize >> 30} GiB of address space cannot be reserved: {error}")
    return torch.frombuffer(memory, dtype=dtype)


@pytest.mark.parametrize("spread", [False, True], ids=["far", "spread"])
def test_offsets_past_32_bits(case, backend, spread, check_contract, device_of):
    if device_of(backend) != "cpu":
        pytest.skip("memory of a GPU cannot be reserved without being taken")

    def far(function):
        return lambda **tensors: function(**{name: Far.apply(t, spread) for name, t in tensors.items()})

    check_contract(backend, far(case.ours), case.eager, case.make, torch.bfloat16)


def test_two_threads(case, kernel_backend, check_contract):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check_contract(kernel_backend, case.ours, case.eager, case.make, case.dtype)
    finally:
        torch.set_num_threads(threads)
