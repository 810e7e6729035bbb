"""What was replaced by what, what was left alone, and why."""

import re
import textwrap
from collections import defaultdict
from dataclasses import asdict, dataclass

import torch
from torch import nn

from .. import backends
from ..backends import BackendError, _auto, offered
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
class Choice:
    """A backend, the ops of the model that would run on it now, and why."""

    backend: str
    why: str
    ops: list[str]


@dataclass
class Report:
    """What :func:`explain` returns: ``str()`` of it is a table to read, ``as_dict()`` is for programs.

    Attributes:
        model: the name of the model's class.
        dry_run: whether it says what would be done, instead of what was done.
        backend: what was asked for.
        replaced, left: the modules that have stand-ins, and those that have none.
        choices: which backends the ops of the stand-ins would run on.
        padding: for each encoder when its padding is removed, and what its last forward did.
        layout_bytes: the size of the copies of weights that are laid out for inference.
    """

    model: str
    dry_run: bool
    backend: str
    replaced: list[Row]
    left: list[Row]
    choices: list[Choice]
    padding: list[str]
    layout_bytes: int

    def as_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        verb = "would be replaced" if self.dry_run else "replaced"
        total = sum(row.count for row in self.replaced)
        lines = [f"{self.model}: {total} modules {verb}; backend {self.backend}"]
        shown = [row for row in self.replaced if not row.inside]
        cells = [(f"{r.count} x", r.where, r.was, r.now, r.backend) for r in shown]
        table = _table(("", "path", "was", "is", "backend"), cells) if shown else []
        lines += table[:1]
        for row, line in zip(shown, table[1:], strict=True):
            lines += [line, f"         {row.note}"]
        inside = sum(row.count for row in self.replaced if row.inside)
        if inside:
            lines.append(f"  and {inside} inside these, for when one has to be called module by module")
        if self.choices:
            lines.append("backends:")
        for choice in self.choices:
            lines += _wrapped(f"{choice.backend}, {choice.why}: {', '.join(choice.ops)}")
        if self.padding:
            lines.append("padding:")
            lines += [line for text in self.padding for line in _wrapped(text)]
        if self.layout_bytes:
            lines.append(f"laid-out weights: {self.layout_bytes / 2**20:.1f} MiB")
        if self.left:
            lines.append("left as they are:")
            lines += _table(
                ("", "path", "is", "why"), [(f"{r.count} x", r.where, r.now, r.note) for r in self.left]
            )
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
    chosen: dict[tuple[str, str], dict[str, None]] = {}
    kept = padding_kept_below(model) if options else {}
    like = next(model.parameters(), None)  # tells the device of modules that have no parameter
    fused: list[str] = []  # paths of the blocks that compute with the modules below them
    for path, module in model.named_modules():
        done, rule = swapped(module), planned.get(id(module))
        below = any(path.startswith(f"{block}.") for block in fused)
        if done or rule:
            standin = done.standin if done else rule.load()
            was = done.original if done else type(module)
            note, ops = (done.does, done.ops) if done else (rule.does, rule.ops)
            found = _choices(ops, module, next(module.parameters(), like), options)
            for op, choice in found.items():
                chosen.setdefault(choice, {})[op] = None
            backend = ", ".join(dict.fromkeys(name for name, _ in found.values()))
            replaced.append((path, _name(was), _name(standin), note, backend, below))
            removes_padding = getattr(standin, "removes_padding", False)
            one_of_many = getattr(standin, "one_of_many", False)  # a layer that removes padding for itself
            if removes_padding:
                asked = options and options.below(kept.get(id(module)))
                padding += [(path, one_of_many, text) for text in _padding_rule(module, asked)]
            # An encoder calls its layers; what lies in a layer is computed with, but not called.
            if one_of_many or not getattr(standin, "calls_modules", removes_padding):
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
        choices=[Choice(*choice, list(ops)) for choice, ops in chosen.items()],
        padding=_padding_lines(padding),
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


def _choices(
    ops: tuple[str, ...], module: nn.Module, like: torch.Tensor | None, options: Options | None
) -> dict[str, tuple[str, str]]:
    """By op of a stand-in: the backend that inputs of a size, with dtype and device of ``like``, run on, and why."""
    example = [] if like is None else [torch.empty(0, dtype=like.dtype, device=like.device)]
    asked = (options or options_of(module)).backend
    found = {}
    for op in ops:
        with backends.use(asked or backends.requested()):
            name = backends.requested()
            if op not in backends._registry.ops():
                # A whole layer, which only some have; else index ops of PyTorch's, whatever the backend.
                if example and (only := offered(op, *example)):
                    found[op] = (only, _why(op, name, asked, *example))
                continue
            try:
                found[op] = (backends.choose(op, *example), _why(op, name, asked, *example))
            except BackendError:
                reasons = "; ".join(backends.why_not(name, op, *example))
                found[op] = (f"{name}: cannot", reasons)
    return found


def _why(op: str, name: str, asked: str | None, *example: torch.Tensor) -> str:
    """Why ``op`` runs where it does, when ``name`` was requested, by ``optimize`` if it is what that was ``asked``."""
    if name != "auto":
        return "because optimize was told so" if name == asked else "because it was asked for"
    if not example:
        return "as no parameter tells the device"
    measured = _auto.measured(op, *example)
    if measured == "native":
        return "as nothing faster has been proved on this device"
    reasons = backends.why_not(measured, op, *example)
    if reasons:
        return f"as {measured} cannot ({'; '.join(reasons)})"
    return "the fastest measured here"


def _padding_rule(module: nn.Module, options: Options | None) -> list[str]:
    """When padding is removed, and what the last forward did."""
    options = options or options_of(module)
    rule = {
        "auto": "removed where a 2-D mask shows some and position 0 is real",
        True: "removed where a 2-D mask shows some",
        False: f"kept: {options.kept_because}",
    }[options.remove_padding]
    last = last_forward(module)
    return [rule, *([f"last forward {last}"] if last else [])]


def _padding_lines(found: list[tuple[str, bool, str]]) -> list[str]:
    """By path; one line for all layers of which the same is to be said."""
    lines = (f"{(_starred(path) if many else path) or 'the model'}: {text}" for path, many, text in found)
    return list(dict.fromkeys(lines))


def _starred(path: str) -> str:
    return re.sub(r"\b\d+\b", "*", path)


def _grouped(rows: list[tuple]) -> list[Row]:
    """Rows that differ in the number of their layer alone, as one."""
    groups = defaultdict(int)
    for path, *rest in rows:
        groups[(_starred(path) or "(the model itself)", *rest)] += 1
    return [Row(where, count, *rest) for (where, *rest), count in groups.items()]


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines with the cells in columns, the first column to the right."""
    wide = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    wide[0] = max(wide[0], 5)
    return [
        "  ".join(
            (f"  {row[0]:>{wide[0]}}", *(f"{c:{w}}" for c, w in zip(row[1:], wide[1:], strict=True)))
        ).rstrip()
        for row in (heads, *rows)
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
