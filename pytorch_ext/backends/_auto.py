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
    ("gelu", "cpu"): "cpu",
    ("layer_norm", "cpu"): "cpu",
    ("linear", "cpu"): "cpu",
    ("scaled_dot_product_attention", "cpu"): "cpu",
    ("varlen_attention", "cpu"): "cpu",
}

# From how many elements of its first tensor on. Below, a kernel of ours saves less than it costs to call it.
WORTHWHILE: dict[tuple[str, str], int] = {
    ("bias_gelu", "cpu"): 2**14,
    ("dropout_add_layer_norm", "cpu"): 2**14,
    ("gelu", "cpu"): 2**17,
    ("layer_norm", "cpu"): 2**17,
    ("linear", "cpu"): 2**14,
}


def fastest(op: str, tensor: Tensor) -> str:
    if not FASTEST:
        return "native"
    device = "cpu"
    if not tensor.is_cpu:
        device = tensor.device.type
    if device == "cuda":
        major, minor = cuda_capability(tensor.device.index)
        device = f"sm_{major}{minor}"
    backend = FASTEST.get((op, device), "native")
    if backend == "native" or torch.compiler.is_compiling():
        return backend  # a graph is for many sizes, and calls without Python in between
    # A tensor without elements stands for those of any size, as where a report asks.
    return "native" if 0 < tensor.numel() < WORTHWHILE.get((op, device), 0) else backend
