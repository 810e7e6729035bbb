"""``activation(input @ weight.T + bias)`` and its gradients."""

import torch
from torch import Tensor

from .gelu import gelu, gelu_derivative
from .layer_norm import as_rows, parameter_gradient
from .precision import compute_dtype, stored


def linear_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    keep_preactivation: bool,
    frozen: bool,
) -> tuple[Tensor, Tensor]:
    """``(out, preactivation)``; the second is empty unless it is asked for.

    ``weight`` is ``(out_features, in_features)``; ``activation`` is ``"none"``, ``"relu"``, ``"gelu"`` or
    ``"gelu_tanh"``. ``frozen`` says that the weight takes no gradient, so that a backend may keep a layout of it.
    """
    dtype = compute_dtype(input, weight)
    x = input.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        x = x + bias.to(dtype)
    out = stored(activate(x, activation), input.dtype)
    return out, stored(x, input.dtype) if keep_preactivation else input.new_empty(0)


def linear_bwd(
    dout: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    preactivation: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dinput, dweight, dbias)``."""
    dtype = compute_dtype(input, weight)
    dx = dout.to(dtype)
    if activation != "none":
        dx = dx * activation_derivative(preactivation.to(dtype), activation)
    rows = as_rows(dx)  # (rows, out_features)
    inputs = as_rows(input.to(dtype))
    dinput = (rows @ weight.to(dtype)).reshape(input.shape)
    return (
        stored(dinput, input.dtype),
        stored(rows.T @ inputs, weight.dtype),
        parameter_gradient(rows.sum(0), bias, dout),
    )


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.relu(x)
    if activation == "gelu":
        return gelu(x, "none")
    if activation == "gelu_tanh":
        return gelu(x, "tanh")
    return x


def activation_derivative(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return (x > 0).to(x.dtype)
    return gelu_derivative(x, "tanh" if activation == "gelu_tanh" else "none")
