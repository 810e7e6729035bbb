"""What ``auto`` takes: for each op and device the fastest backend that has passed its tests there.

Rows come from measurements (``benchmarks/bench_<op>.py``), never from hope. Where there is none, ``native`` runs. A GPU
is named by its architecture, because a kernel that is right and fast on one is neither, until tested, on another.
"""

import torch
from torch import Tensor

from ._requirements import cuda_capability

# (op, "cpu" or "sm_90") -> backend
FASTEST: dict[tuple[str, str], str] = {
    ("bias_gelu", "cpu"): "cpu",
    ("dropout_add_layer_norm", "cpu"): "cpu",
    ("embedding_layer_norm", "cpu"): "cpu",
    ("encoder_layer", "cpu"): "cpu",
    ("gelu", "cpu"): "cpu",
    ("layer_norm", "cpu"): "cpu",
    ("linear", "cpu"): "cpu",
    ("scaled_dot_product_attention", "cpu"): "cpu",
    ("varlen_attention", "cpu"): "cpu",
}

# From how many elements of its first tensor on. Below, a kernel of ours saves less than it costs to call it.
WORTHWHILE: dict[tuple[str, str], int] = {
    ("bias_gelu", "cpu"): 2**11,
    ("dropout_add_layer_norm", "cpu"): 2**14,
    ("gelu", "cpu"): 2**11,
    ("layer_norm", "cpu"): 2**15,
    ("linear", "cpu"): 2**10,
}

# Under ``torch.compile`` without gradients, where that differs: Inductor makes one loop of PyTorch's op and of its
# neighbours, which is worth more than what a kernel of ours saves. With gradients ours win (docs/tuning.md).
COMPILED_INFERENCE: dict[tuple[str, str], str] = {
    ("layer_norm", "cpu"): "native",
}


def measured(op: str, tensor: Tensor) -> str:
    """The row for ``op`` on the device of ``tensor``, whatever its size; ``"native"`` if there is none."""
    return FASTEST.get((op, _device(tensor)), "native")


def fastest(op: str, tensor: Tensor) -> str:
    if not FASTEST:
        return "native"
    row = op, _device(tensor)
    backend = FASTEST.get(row, "native")
    if backend == "native":
        return backend
    if torch.compiler.is_compiling():
        # Of no size: a graph is for many, and calls without Python in between.
        return backend if torch.is_grad_enabled() else COMPILED_INFERENCE.get(row, backend)
    # A tensor without elements stands for those of any size, as where a report asks.
    return "native" if 0 < tensor.numel() < WORTHWHILE.get(row, 0) else backend


def _device(tensor: Tensor) -> str:
    if tensor.is_cpu:
        return "cpu"
    device = tensor.device.type
    if device == "cuda":
        major, minor = cuda_capability(tensor.device.index)
        device = f"sm_{major}{minor}"
    return device
