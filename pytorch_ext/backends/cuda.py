"""``cuda``: CUDA C++ kernels, in the compiled library ``pytorch_ext._cuda``.

The library registers its raw ops with the dispatcher, in a namespace of its own. It knows the stable ABI of LibTorch
alone, so it loads under any later PyTorch, with CUDA or without. Matrix products are cuBLAS's: ``linear`` is here.
"""

import functools
import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ._requirements import capability, cuda_capability, dtypes, fact, on_device

DESCRIPTION = "CUDA C++ for NVIDIA GPUs from sm_80 on"
LIBRARY = "pytorch_ext._cuda"
NAMESPACE = "pytorch_ext_cuda"
# The kernels keep a row in registers. As WIDEST in csrc/cuda/tensors.h.
WIDEST = 8192
NORMS = ("dropout_add_layer_norm", "embedding_layer_norm", "encoder_layer", "layer_norm")
ATTENTION = ("scaled_dot_product_attention", "varlen_attention")
# Those for which csrc/cuda/attention_kernels.cuh has kernels, of two bytes an element, which tensor cores multiply.
HEAD_SIZES = (32, 64, 96, 128)


@functools.cache
def kernels() -> dict[str, Callable]:
    return table(NAMESPACE) if library() else {}


def table(namespace: str) -> dict[str, Callable]:
    """The raw ops that a library has registered in ``namespace``, and what is made of them here."""
    ops = getattr(torch.ops, namespace)
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    found = {name: getattr(ops, name).default for space, _, name in names if space == namespace}
    if "gelu_fwd" in found:
        found["linear_fwd"] = functools.partial(linear_fwd, found["gelu_fwd"])
        found["linear_bwd"] = functools.partial(linear_bwd, found["gelu_bwd"])
    return found


def why_not(op: str, *tensors: Tensor) -> list[str]:
    reasons = [*_missing(), *on_device(tensors, "cuda"), *capability(tensors, (8, 0)), *dtypes(tensors)]
    return [*reasons, *_other_architecture(tensors), *_too_wide(op, tensors), *_unfit_heads(op, tensors)]


def architectures() -> str | None:
    """What the library was built for, such as ``"sm_80, sm_90, PTX of 90"``; None where there is no library."""
    spec = importlib.util.find_spec(LIBRARY)
    if spec is None:
        return None
    # Read and not asked: it is of interest above all where the library cannot be loaded.
    found = re.search(rb"pytorch_ext::_cuda was built for ([\w, ]+)\0", Path(spec.origin).read_bytes())
    return found[1].decode() if found else "unknown architectures"


def library() -> ModuleType | None:
    """The compiled library; None where there is a reason not to use it."""
    return _loaded()[0]


@fact
def _missing() -> tuple[str, ...]:
    return () if kernels() else _loaded()[1]


@functools.cache
def _loaded() -> tuple[ModuleType | None, tuple[str, ...]]:
    """The library, or in one sentence why it is not used."""
    if importlib.util.find_spec(LIBRARY) is None:
        return None, (f"the compiled library {LIBRARY} is not in this installation",)
    try:
        return importlib.import_module(LIBRARY), ()
    except (ImportError, OSError, RuntimeError) as error:
        return None, (f"the compiled library {LIBRARY} cannot be loaded: {error}",)


def _other_architecture(tensors: tuple[Tensor, ...]) -> tuple[str, ...]:
    found = cuda_capability(next((t.device.index for t in tensors if t.is_cuda), None))
    return () if found is None else _not_built_for(*found)


@fact
def _not_built_for(major: int, minor: int) -> tuple[str, ...]:
    built = architectures()
    if built is None or any(_runs(part, major, minor) for part in built.split(", ")):
        return ()
    return (f"the compiled library {LIBRARY} was built for {built}, and this GPU is sm_{major}{minor}",)


def _runs(built: str, major: int, minor: int) -> bool:
    """Whether machine code (``sm_80``, and ``sm_90a`` for that GPU alone) or PTX (``PTX of 90``) runs on a GPU."""
    number, exact = re.search(r"(\d+)([af]?)$", built).groups()
    theirs = int(number[:-1]), int(number[-1])
    if exact:
        return theirs == (major, minor)
    return theirs <= (major, minor) and (built.startswith("PTX") or theirs[0] == major)


def _too_wide(op: str, tensors: tuple[Tensor, ...]) -> list[str]:
    if op not in NORMS or not tensors or tensors[0].dim() == 0:
        return []
    # A weight or a bias knows how many dimensions a LayerNorm is over.
    of_parameter = op == "layer_norm" and len(tensors) > 1
    cols = tensors[-1].numel() if of_parameter else tensors[0].shape[-1]
    return [f"its rows have at most {WIDEST} elements, and these have {cols}"] if cols > WIDEST else []


def _unfit_heads(op: str, tensors: tuple[Tensor, ...]) -> list[str]:
    if op not in ATTENTION or len(tensors) < 3:
        return []
    query, value, mask = tensors[0], tensors[2], tensors[3] if len(tensors) > 3 else None
    reasons = []
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(query.device.type)
    if dtype == torch.float32:
        reasons.append(f"its attention is for bfloat16 and float16, and this is {dtype}")
    if query.shape[-1] not in HEAD_SIZES or value.shape[-1] != query.shape[-1]:
        found = " and ".join(dict.fromkeys(str(t.shape[-1]) for t in (query, value)))
        reasons.append(f"its attention is for heads of 32, 64, 96 or 128 elements, and these have {found}")
    if mask is not None:
        reasons += _unfit_mask(mask, of_heads_that_share=query.shape[-3:-2] != tensors[1].shape[-3:-2])
    return reasons


def _unfit_mask(mask: Tensor, of_heads_that_share: bool) -> list[str]:
    def differs(dim: int) -> bool:
        return mask.dim() >= -dim and mask.shape[dim] > 1 and mask.stride(dim) != 0

    if mask.dtype != torch.bool:
        return [f"its attention takes masks of torch.bool, and this one is {mask.dtype}"]
    if differs(-2):
        return ["its attention takes masks of keys, and this one differs from query to query"]
    if of_heads_that_share and differs(-3):
        return ["its attention takes one mask for the heads that share keys, and this one differs"]
    return []


# Activation -> whether cuBLASLt's epilogue, which `_addmm_activation` asks for, is GELU, in its tanh form, or ReLU.
_EPILOGUES = {"relu": False, "gelu_tanh": True}


def linear_fwd(
    gelu_fwd: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    keep_preactivation: bool,
    frozen: bool,
) -> tuple[Tensor, Tensor]:
    # On the CPU PyTorch's GELU epilogue is the exact form.
    if activation in _EPILOGUES and bias is not None and input.is_cuda and not keep_preactivation:
        x, use_gelu = _as_rows(input), _EPILOGUES[activation]
        out = torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=use_gelu)
        return out.view(*input.shape[:-1], weight.shape[0]), input.new_empty(0)
    product = F.linear(input, weight, bias)
    if activation == "relu":
        out = torch.relu(product)
    elif activation != "none":
        out = gelu_fwd(product, "tanh" if activation == "gelu_tanh" else "none")
    else:
        # Two outputs must not share memory.
        return product, product.clone() if keep_preactivation else input.new_empty(0)
    return out, product if keep_preactivation else input.new_empty(0)


def linear_bwd(
    gelu_bwd: Callable,
    dout: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    preactivation: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if activation == "relu":
        dout = torch.ops.aten.threshold_backward(dout, preactivation, 0)
    elif activation != "none":
        dout = gelu_bwd(dout, preactivation, "tanh" if activation == "gelu_tanh" else "none")
    rows, inputs = _as_rows(dout), _as_rows(input)
    dbias = dout.new_empty(0) if bias is None else rows.sum(0, dtype=bias.dtype)
    return (rows @ weight).view(input.shape), rows.t() @ inputs, dbias


def _as_rows(x: Tensor) -> Tensor:
    """``(*rows, cols)`` as ``(rows, cols)``, of any sizes, 0 among them."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
