"""An ONNX file against the model that it was made from: ONNX's own checker, and ONNX Runtime at two shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._errors import ExportError, first_line, optional
from ._inputs import Inputs
from ._trace import run

# Other programs sum in another order: of one sum the error is a few eps, of a model's a few hundred.
_ROUNDINGS = 1000


def check(path: Path, model: nn.Module, inputs: Inputs) -> tuple[float, list[str]]:
    """The largest difference to PyTorch's output, and the shapes at which it was looked for.

    Raises:
        ExportError: the checker refuses the file, ONNX Runtime cannot run it, or the outputs differ by more than
            rounding: by 1000 eps of their largest value.
    """
    onnx, runtime = optional("onnx"), optional("onnxruntime")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"ONNX's checker refuses the graph: {first_line(error)}") from error
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what it says is in the exception too
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot load the graph: {first_line(error)}") from error
    calls = at_two_shapes(inputs)
    return max(_difference(session, model, call) for call in calls), [call.shapes for call in calls]


def at_two_shapes(inputs: Inputs) -> list[Inputs]:
    """The inputs, and where a size is free the same at other sizes."""
    return [inputs, inputs.other()] if inputs.sizes else [inputs]


def named_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors of a model's output by the names of its fields."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    tensors = [(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
    if len(tensors) == 1 and not tensors[0][0]:
        return {"output": tensors[0][1]}
    return {_name(path): tensor for path, tensor in tensors}


def _name(path: tuple) -> str:
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    return "_".join(["output", *keys] if keys[0].isdigit() else keys)


def _difference(session: Any, model: nn.Module, inputs: Inputs) -> float:
    wanted = named_outputs(run(model, inputs))
    try:
        found = session.run(list(wanted), _feed(session, inputs))
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime fails on inputs of {inputs.described}: {first_line(error)}"
        ) from error
    return largest_difference(wanted, map(torch.as_tensor, found), inputs)


def largest_difference(wanted: Mapping[str, Tensor], found: Iterable[Tensor], inputs: Inputs) -> float:
    """Between the model's outputs by name and those of what was made from it, in the same order.

    Raises:
        ExportError: other shapes, or a difference that no rounding explains.
    """
    largest = 0.0
    for (name, ours), theirs in zip(wanted.items(), found, strict=True):
        ours, theirs = ours.cpu(), theirs.cpu()
        if ours.shape != theirs.shape:
            shapes = f"{tuple(theirs.shape)} in the file and {tuple(ours.shape)} in PyTorch"
            raise ExportError(f"{name} is of shape {shapes}, for inputs of {inputs.described}")
        if not ours.numel():
            continue
        # Infinities of one sign and NaN on both sides are equal.
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        worst = (ours.double() - theirs.double()).abs().masked_fill(same, 0.0).max().item()
        limit = _limit(ours)
        if not worst <= limit:
            raise ExportError(
                f"{name} differs from PyTorch's by {worst:.3g}, more than {limit:.3g}, for inputs of {inputs.described}"
            )
        largest = max(largest, worst)
    return largest


def _limit(output: Tensor) -> float:
    if not output.is_floating_point():
        return 0.0
    finite = output[output.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    return _ROUNDINGS * torch.finfo(output.dtype).eps * scale


def _feed(session: Any, inputs: Inputs) -> dict[str, Any]:
    names = [declared.name for declared in session.get_inputs()]
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, inputs.tensors, strict=True)}
