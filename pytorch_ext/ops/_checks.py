"""Argument checks: one clear error that names the argument, what was expected and what came, before any kernel runs.

As in PyTorch: TypeError for what is no tensor, ValueError for a value, RuntimeError for shapes, dtypes and devices,
IndexError for an index out of range.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

APPROXIMATIONS = ("none", "tanh")


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        tensor(name, value)
        raise RuntimeError(f"{name}: expected a floating-point tensor, got dtype {value.dtype}")


def fits(value: object, like: Tensor, expected: tuple[int, ...]) -> bool:
    """The usual case, in half a microsecond: a tensor of this shape, in the dtype and on the device of ``like``."""
    return (
        isinstance(value, Tensor)
        and value.dtype is like.dtype
        and value.shape == expected
        and value.device == like.device
    )


def shape(name: str, value: Tensor, expected: Sequence[int]) -> None:
    if value.shape != torch.Size(expected):
        raise RuntimeError(f"{name}: expected shape {tuple(expected)}, got {tuple(value.shape)}")


def dims(name: str, value: Tensor, expected: int, layout: str) -> None:
    if value.dim() != expected:
        raise RuntimeError(f"{name}: expected {expected} dimensions {layout}, got shape {tuple(value.shape)}")


def same_device(first_name: str, first: Tensor, name: str, value: Tensor) -> None:
    if value.device != first.device:
        raise RuntimeError(f"{name}: expected the device of {first_name}, {first.device}, got {value.device}")


def same_dtype(first_name: str, first: Tensor, name: str, value: Tensor) -> None:
    """Equal dtypes, unless autocast is there to make them equal."""
    if value.dtype != first.dtype and not torch.is_autocast_enabled(first.device.type):
        raise RuntimeError(f"{name}: expected the dtype of {first_name}, {first.dtype}, got {value.dtype}")


def norm_parameter(
    first_name: str, first: Tensor, name: str, value: Tensor | None, expected: tuple[int, ...]
) -> None:
    """The weight or bias of a normalisation: in the dtype of ``first``, or in float32 beside a lower one."""
    if value is None or fits(value, first, expected):
        return
    parameter(first_name, first, name, value, expected)
    if value.dtype != first.dtype and (value.dtype != torch.float32 or first.dtype == torch.float64):
        same_dtype(first_name, first, name, value)


def parameter(
    first_name: str, first: Tensor, name: str, value: Tensor | None, expected: tuple[int, ...]
) -> None:
    """A weight or bias beside an activation: a floating tensor of the expected shape on the same device."""
    if value is None or fits(value, first, expected):
        return
    floating(name, value)
    if value.shape != torch.Size(expected):
        shape(name, value, expected)
    if value.device != first.device:
        same_device(first_name, first, name, value)


def probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability between 0 and 1, got {value}")


def approximate(value: str) -> None:
    if value not in APPROXIMATIONS:
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {value!r}")


def readable(value: Tensor) -> bool:
    """Whether its numbers can be looked at: for nothing on the CPU, never while something traces or maps the call."""
    return (
        value.is_cpu and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    )


def ids(name: str, value: Tensor, table_name: str, table: Tensor) -> None:
    """Integer ids on the device of ``table``."""
    tensor(name, value)
    if value.dtype is not torch.int64 and value.dtype is not torch.int32:
        raise RuntimeError(f"{name}: expected dtype torch.int64 or torch.int32, got {value.dtype}")
    same_device(table_name, table, name, value)


def ids_within(name: str, value: Tensor, table_name: str, table: Tensor) -> None:
    """Ids that are rows of ``table``; the values are read on the CPU alone, where that waits for nobody."""
    if not readable(value) or value.numel() == 0:
        return
    least, greatest = value.aminmax()
    least, greatest = least.item(), greatest.item()
    if least < 0 or greatest >= table.shape[0]:
        wrong = least if least < 0 else greatest
        raise IndexError(
            f"{name}: expected ids from 0 to {table.shape[0] - 1} (the rows of {table_name}), got {wrong}"
        )
