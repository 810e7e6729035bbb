"""Autocast for the ops whose kernels are not PyTorch's: the same casts that PyTorch's autocast lists make."""

import torch
from torch import Tensor


def lowered(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """For matrix products and attention: floating tensors in the active autocast dtype, float64 as it is."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return tensors  # the usual case, in less time than looking for a device takes
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if _castable(t) else t for t in tensors)


def raised(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """For normalisation: float32 under CUDA's autocast, as its list says; the CPU's leaves the dtype alone."""
    if not torch.is_autocast_enabled("cuda") or not any(t is not None and t.is_cuda for t in tensors):
        return tensors
    return tuple(t.float() if _castable(t) else t for t in tensors)


def _castable(t: Tensor | None) -> bool:
    return t is not None and t.is_floating_point() and t.dtype != torch.float64
