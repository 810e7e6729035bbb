"""``to_onnx`` and ``to_pt2``: any model as a file that others can run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ._check import at_two_shapes, check, largest_difference, named_outputs
from ._errors import ExportError, first_line, optional
from ._files import written
from ._inputs import Inputs
from ._trace import inference, quiet, run, trace
from ._translation import ATTENTION, OLDEST, translation_table


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file; large weights lie beside it in ``<path>.data``.
        nodes: how many nodes of each type the graph has.
        free: the names of the sizes that may differ from call to call.
        most: the largest that such a size may be, where the model has a limit.
        difference: the largest to PyTorch's output; None if nobody looked.
        shapes: of the inputs with which it was looked for.
    """

    path: Path
    nodes: Counter[str]
    free: tuple[str, ...]
    difference: float | None = None
    shapes: list[str] = field(default_factory=list)
    most: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in self.nodes.most_common())
        lines = [f"{self.path}: {self.nodes.total()} nodes: {types}"]
        free = [f"{name} (at most {self.most[name]})" if name in self.most else name for name in self.free]
        lines.append(f"free sizes: {', '.join(free) or 'none'}")
        if self.difference is not None:
            shapes = " and of ".join(self.shapes)
            lines.append(
                f"largest difference to PyTorch's output, for inputs of {shapes}: {self.difference:.3g}"
            )
        return "\n".join(lines)


def to_onnx(
    model: nn.Module | ExportedProgram,
    args: Any,
    path: str | os.PathLike,
    *,
    kwargs: Mapping[str, Any] | None = None,
    opset: int = ATTENTION,
    dynamic: bool | Mapping[str, Mapping[int, str]] = True,
    check_outputs: bool = True,
) -> Exported:
    """Writes ``model`` to ``path`` as ONNX, in standard ops alone, for inference.

    A model that ``optimize`` has changed is written as it computes, with one node per attention, LayerNorm and GELU,
    and with its padding. Modules in training mode are in evaluation mode for the time of the export.

    Args:
        model: any module, or an ``ExportedProgram``, which has its sizes fixed or free already and is not run.
        args: example inputs, a tensor or a tuple; ``()`` if all go by name.
        kwargs: example inputs by name.
        opset: 18 or later. ``Gelu`` is a node from 20 on, ``Attention`` from 23 on.
        dynamic: whether batch size (dimension 0) and length (dimension 1 of inputs of two or three dimensions; behind
            fixed channels dimension 2) may differ from call to call, where the model does not fix them; or just these:
            argument -> dimension -> name.
        check_outputs: compare ONNX Runtime's outputs with the model's at two shapes.

    Returns:
        What was written, and how far the outputs are from PyTorch's.

    Raises:
        TypeError: ``model`` is neither.
        ValueError: an ``opset`` before 18.
        ExportError: inputs that do not fit, a model that cannot be traced or written in ONNX, outputs that differ, a
            path that cannot be written to. There is no file then, or the one that was there before.
    """
    path = Path(path)
    if opset < OLDEST:
        raise ValueError(f"opset: expected {OLDEST} or later, got {opset}")
    optional("onnx")
    optional("onnxscript")
    if isinstance(model, ExportedProgram):
        with written(path) as temporary:
            graph = _save(_converted(model, opset, None, None), temporary)
        return Exported(path, _counted(graph), ())
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module or an ExportedProgram, got {type(model).__name__}"
        )
    with inference(model), written(path) as temporary:
        program, inputs = trace(model, args, kwargs, dynamic)
        names = list(named_outputs(run(model, inputs)))
        graph = _save(_converted(program, opset, names, inputs), temporary)
        difference, shapes = check(temporary, model, inputs) if check_outputs else (None, [])
    return Exported(path, _counted(graph), tuple(inputs.sizes), difference, shapes, inputs.most)


def to_pt2(
    model: nn.Module,
    args: Any,
    path: str | os.PathLike,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic: bool | Mapping[str, Mapping[int, str]] = True,
) -> Exported:
    """Writes ``model`` to ``path`` for ``torch.export.load``, in PyTorch's own ops: who loads it needs PyTorch alone.

    Arguments and errors as :func:`to_onnx`; the outputs of the program are compared with the model's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    path = Path(path)
    with inference(model), written(path) as temporary:
        program, inputs = trace(model, args, kwargs, dynamic)
        calls = at_two_shapes(inputs)
        difference = max(_difference(program, model, call) for call in calls)
        with quiet():
            torch.export.save(program, temporary)
    nodes = Counter(_op_name(node.target) for node in program.graph.nodes if node.op == "call_function")
    shapes = [call.shapes for call in calls]
    return Exported(path, nodes, tuple(inputs.sizes), difference, shapes, inputs.most)


def _difference(program: ExportedProgram, model: nn.Module, inputs: Inputs) -> float:
    try:
        with torch.no_grad():
            found = program.module()(*inputs.args, **inputs.kwargs)
    except Exception as error:  # a guard that does not hold is an AssertionError
        raise ExportError(
            f"model: what was traced of it does not take inputs of {inputs.described}: {first_line(error)}"
        ) from error
    return largest_difference(named_outputs(run(model, inputs)), named_outputs(found).values(), inputs)


def _converted(program: ExportedProgram, opset: int, names: list[str] | None, inputs: Inputs | None) -> Any:
    """PyTorch's ``ONNXProgram``, without what is computed twice."""
    passes = optional("onnx_ir.passes.common")
    free = None if inputs is None else list(inputs.free)
    try:
        with quiet(), torch.no_grad():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                output_names=names,
                dynamic_shapes=free,
                custom_translation_table=translation_table(opset),
            )
            passes.CommonSubexpressionEliminationPass()(converted.model)
    except Exception as error:
        raise ExportError(f"model: it cannot be written in ONNX: {_cause(error)}") from error
    foreign = {node.domain for node in converted.model.graph if node.domain}
    if foreign:
        raise ExportError(
            f"model: it cannot be written in standard ONNX ops alone, but needs {', '.join(foreign)}"
        )
    return converted


def _save(converted: Any, path: Path) -> Any:
    """PyTorch puts weights of more than 2 GB, which is all that a graph can hold, into a file of their own."""
    try:
        converted.save(path)
    except OSError as error:
        raise ExportError(f"path: cannot write to {path.name}: {error.strerror}") from error
    return converted.model.graph


def _counted(graph: Any) -> Counter[str]:
    return Counter(node.op_type for node in graph.all_nodes())


def _op_name(target: Any) -> str:
    return target._opname if isinstance(target, torch._ops.OpOverload) else target.__name__


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
