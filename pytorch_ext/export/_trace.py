"""A model as an ``ExportedProgram`` of PyTorch's own ops, which is what both file formats are made of."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from ..backends import portable
from ._errors import ExportError, first_line
from ._inputs import Inputs, inputs_of

_TALKATIVE = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")


def trace(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    dynamic: bool | Mapping[str, Mapping[int, str]],
) -> tuple[ExportedProgram, Inputs]:
    """The program, and the inputs with what is free in it.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ExportError: inputs that do not fit, a ``forward`` that fails or cannot be traced, or a size that ``dynamic``
            names and ``forward`` fixes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    asked = isinstance(dynamic, Mapping)
    inputs = inputs_of(model, args, kwargs, dynamic)
    run(model, inputs)  # what fails by itself says so by itself
    inputs = _at_least_two(model, inputs, asked)
    program = _exported(model, inputs)
    _keep_free(program, inputs, asked)
    if dynamic is True and inputs.free_lengths():
        program = _exported(model, inputs)
        _keep_free(program, inputs, asked)
    return program, inputs


def _at_least_two(model: nn.Module, inputs: Inputs, asked: bool) -> Inputs:
    """Every free size, since PyTorch takes a size of 1 for a fixed one; where the model takes 1 alone it is one."""
    for name in [name for name, size in inputs.sizes.items() if size == 1]:
        larger = inputs.with_sizes({**inputs.sizes, name: 2})
        try:
            run(model, larger)
        except ExportError:
            if asked:
                raise
            inputs.fix(name)
        else:
            inputs = larger
    return inputs


def _exported(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    shapes = ShapesCollection()
    for tensor, free in zip(inputs.tensors, inputs.free, strict=True):
        if free:
            shapes[tensor] = dict.fromkeys(free, Dim.AUTO)
    try:
        with portable(), torch.no_grad(), quiet():
            return torch.export.export(
                model,
                inputs.args,
                inputs.kwargs,
                dynamic_shapes=shapes if len(shapes) else None,
                strict=False,
            )
    except Exception as error:  # whatever a forward raises, or PyTorch of it
        name = type(model).__name__
        raise ExportError(f"model: {name}.forward cannot be traced: {first_line(error)}") from error


def run(model: nn.Module, inputs: Inputs) -> Any:
    """The output of the model itself, with its padding."""
    try:
        with portable(), torch.no_grad():
            return model(*inputs.args, **inputs.kwargs)
    except Exception as error:
        name = type(model).__name__
        raise ExportError(
            f"model: {name} fails on inputs of {inputs.described}: {first_line(error)}"
        ) from error


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters tell their own developers."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # Of a graph that it cannot finish PyTorch prints the code so far.
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _keep_free(program: ExportedProgram, inputs: Inputs, asked: bool) -> None:
    """Leaves in ``inputs.free`` what the program did not fix, and notes how large it may become.

    ONNX has no place for such a limit, and a graph says nothing of it: beyond, ``forward`` would have gone another way.
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str) and name in nodes]
    traced = [(name, nodes[name].meta.get("val")) for name in names]
    traced = [(name, value) for name, value in traced if isinstance(value, Tensor)]
    for (name, value), free in zip(traced, inputs.free, strict=True):
        for dim in [dim for dim in free if is_concrete_int(value.shape[dim])]:
            if asked:
                size = int(value.shape[dim])
                raise ExportError(
                    f"dynamic: dimension {dim} of {name} is {size} and nothing else in this model"
                )
            del free[dim]
        for dim, size in free.items():
            limits = program.range_constraints.get(value.shape[dim].node.expr)
            if limits is not None and limits.upper.is_Integer:  # else infinity
                most = int(limits.upper)
                inputs.most[size] = min(most, inputs.most.get(size, most))
