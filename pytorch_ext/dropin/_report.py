"""What was replaced by what, what was left alone, and why."""

import re
from collections import defaultdict
from dataclasses import asdict, dataclass

import torch
from torch import nn

from .. import backends
from ..backends import BackendError
from . import _layouts
from ._padding import last_forward
from ._swap import Options, Rule, all_swapped, options_of, swapped
from .rules import padding_kept_below, rule_for


@dataclass
class Row:
    """Modules of one kind at the same place of every layer.

    Attributes:
        where: their path, with ``*`` for the number of a layer.
        count: how many there are.
        was, now: class names; equal if they were left alone.
        note: what the stand-in does, or why they were left alone.
        backend: which backend its ops would run on now; empty if they were left alone.
        inside: whether they lie in a fused block, which calls them only where something keeps it from fusing.
    """

    where: str
    count: int
    was: str
    now: str
    note: str
    backend: str = ""
    inside: bool = False


@dataclass
class Report:
    """What :func:`explain` returns: ``str()`` of it is a table to read, ``as_dict()`` is for programs."""

    model: str
    dry_run: bool
    backend: str
    replaced: list[Row]
    left: list[Row]
    padding: list[str]
    layout_bytes: int

    def as_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        verb = "would be replaced" if self.dry_run else "replaced"
        total = sum(row.count for row in self.replaced)
        lines = [f"{self.model}: {total} modules {verb}; backend {self.backend}"]
        shown = [row for row in self.replaced if not row.inside]
        for row, line in zip(shown, _aligned(shown), strict=True):
            lines += [f"{line}  {row.backend}".rstrip(), f"         {row.note}"]
        inside = sum(row.count for row in self.replaced if row.inside)
        if inside:
            lines.append(
                f"  and {inside} inside these blocks, for when one has to be called module by module"
            )
        lines += [f"  padding: {line}" for line in self.padding]
        if self.layout_bytes:
            lines.append(f"  laid-out weights: {self.layout_bytes / 2**20:.1f} MiB")
        if self.left:
            lines.append("left as they are:")
            lines += [f"{line}  {row.note}" for row, line in zip(self.left, _aligned(self.left), strict=True)]
        return "\n".join(lines)


def explain(model: nn.Module) -> Report:
    """What ``optimize`` did to ``model`` and which backend would run it now, what it left alone, and why.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return describe(model)


def describe(
    model: nn.Module, options: Options | None = None, planned: dict[int, Rule] | None = None
) -> Report:
    """The report of ``model`` as it is, or with ``planned`` (a rule by a module's id) as it would be."""
    planned = planned or {}
    replaced, left, padding = [], [], []
    kept = padding_kept_below(model) if options else {}
    fused: list[str] = []  # paths of the blocks that compute with the modules below them
    for path, module in model.named_modules():
        done, rule = swapped(module), planned.get(id(module))
        below = any(path.startswith(f"{block}.") for block in fused)
        if done or rule:
            standin = done.standin if done else rule.load()
            was = done.original if done else type(module)
            note, ops = (done.does, done.ops) if done else (rule.does, rule.ops)
            backend = _backends(ops, module, options)
            replaced.append((path, _name(was), _name(standin), note, backend, below))
            if getattr(standin, "removes_padding", False):
                asked = options and options.below(kept.get(id(module)))
                where = path or "the model"
                if getattr(standin, "one_of_many", False):  # what holds for one layer holds for all
                    where = re.sub(r"\b\d+\b", "*", where)
                    fused.append(path)
                padding += [line for line in _padding_rule(where, module, asked) if line not in padding]
            elif not getattr(standin, "calls_modules", False):
                fused.append(path)
        elif not below:
            reason = _left_reason(module)
            if reason:
                left.append((path, _name(type(module)), _name(type(module)), reason))
    backend = next((options_of(m).backend for _, m in all_swapped(model)), None) or backends.requested()
    if options is not None and options.backend is not None:
        backend = options.backend
    return Report(
        model=type(model).__name__,
        dry_run=bool(planned) or options is not None,
        backend=backend,
        replaced=_grouped(replaced),
        left=_grouped(left),
        padding=padding,
        layout_bytes=_layouts.size_in_bytes(model),
    )


def _name(cls: type[nn.Module]) -> str:
    """The class's name, and where a module of ours has PyTorch's name, whose it is."""
    return (
        f"pytorch_ext.nn.{cls.__name__}" if cls.__module__.startswith("pytorch_ext.nn.") else cls.__qualname__
    )


def _left_reason(module: nn.Module) -> str | None:
    """Why a module was left alone; None if there is nothing to say, because it only holds others."""
    rule = rule_for(module)
    if rule is not None:
        return rule.unfit(module) or "optimize has not been called"
    computes = any(True for _ in module.parameters(recurse=False))
    return "no rule for it" if computes else None


def _backends(ops: tuple[str, ...], module: nn.Module, options: Options | None) -> str:
    """Which backends the ops of a stand-in would run on, for its own dtype and device and inputs of a size."""
    parameter = next(module.parameters(), None)
    example = [] if parameter is None else [torch.empty(0, dtype=parameter.dtype, device=parameter.device)]
    asked = (options or options_of(module)).backend
    found = {}
    for op in ops:
        if op not in backends._registry.ops():
            continue  # moved by PyTorch's own index ops, whatever the backend
        try:
            with backends.use(asked or backends.requested()):
                found[backends.choose(op, *example)] = None
        except BackendError:
            found[f"{asked}: cannot"] = None
    return ", ".join(found)


def _padding_rule(path: str, module: nn.Module, options: Options | None) -> list[str]:
    """When padding is removed, and what the last forward did."""
    options = options or options_of(module)
    rule = {
        "auto": "removed where a 2-D mask shows some and position 0 is real",
        True: "removed where a 2-D mask shows some",
        False: f"kept: {options.kept_because}",
    }[options.remove_padding]
    last = last_forward(module)
    return [f"{path}: {rule}", *([f"{path}: last forward {last}"] if last else [])]


def _grouped(rows: list[tuple]) -> list[Row]:
    """Rows that differ in the number of their layer alone, as one."""
    groups = defaultdict(int)
    for path, *rest in rows:
        groups[(re.sub(r"\b\d+\b", "*", path) or "(the model itself)", *rest)] += 1
    return [Row(where, count, *rest) for (where, *rest), count in groups.items()]


def _aligned(rows: list[Row]) -> list[str]:
    """How many, where, and what became of them, in columns."""
    classes = [row.was if row.was == row.now else f"{row.was} -> {row.now}" for row in rows]
    wide = max((len(row.where) for row in rows), default=0), max(map(len, classes), default=0)
    return [
        f"  {row.count:3} x  {row.where:{wide[0]}}  {text:{wide[1]}}"
        for row, text in zip(rows, classes, strict=True)
    ]
