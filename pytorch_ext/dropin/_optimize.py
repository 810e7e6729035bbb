"""``optimize``, ``revert``, ``refresh`` and ``optimized``."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from ..backends import BackendError, _registry
from ..backends._choice import checked
from ..nn import _graphs
from ..nn._recorder import CudaRecorder
from . import _huggingface, _layouts
from ._report import Report, describe
from ._swap import Options, all_swapped, options_of, reconfigure, swap, swapped, unswap
from .rules import padding_kept_below, rule_for


def optimize(
    model: nn.Module,
    *,
    backend: str | None = None,
    remove_padding: bool | str = "auto",
    cuda_graphs: bool = False,
    dry_run: bool = False,
) -> nn.Module | Report:
    """Swaps the modules of ``model`` that can be made faster, in place. No weight changes; outputs stay.

    Args:
        model: any module. What no rule knows stays as it is; ``explain`` names it.
        backend: the backend for every op of this model, whatever the context manager and the environment say; by
            default theirs, or the fastest that has been proved.
        remove_padding: ``"auto"``: run an encoder without padding where a mask shows some, position 0 of every
            sequence is real (heads read position 0), and no head weighs all positions against each other (as that for
            question answering does). True: wherever a mask shows some. False: never.
        cuda_graphs: for inference on CUDA: capture the layers of each encoder in a graph for each size of batch, and
            replay that. Where it cannot be (in training, with gradients, with hooks) the layers run as without.
        dry_run: change nothing and return the report of what would be done.

    Returns:
        ``model``, or with ``dry_run`` a report as :func:`explain` gives.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: an unknown ``backend``, ``remove_padding`` or ``cuda_graphs``, or graphs for a model that is not on
            CUDA.
        BackendError: a ``backend`` that cannot run anything here, with every reason.
    """
    options = _checked_options(model, backend, remove_padding, cuda_graphs)
    fitting = [(path, module, rule_for(module)) for path, module in model.named_modules()]
    todo = [(m, rule) for _, m, rule in fitting if rule is not None and rule.unfit(m) is None]
    if dry_run:
        return describe(model, options, {id(m): rule for m, rule in todo})
    standins = [
        rule.load() for _, rule in todo
    ]  # whatever cannot be imported fails before anything has changed
    del standins
    kept = padding_kept_below(model)
    for _, module in all_swapped(model):
        told = options.below(kept.get(id(module)))
        reconfigure(module, replace(told, recompute=options_of(module).recompute))
        _graphs.forget(module)
    for module, rule in todo:
        swap(module, rule, options.below(kept.get(id(module))))
    for _, module in all_swapped(model):
        if getattr(module, "reads_padding_mask", False):
            _huggingface.adopt_config(model, module)
    return model


def revert(model: nn.Module) -> nn.Module:
    """The original classes and configs again, with the weights as they are now.

    Raises:
        RuntimeError: something else has changed the class of a module since (``fully_shard`` does); then nothing is
            reverted.
    """
    _check_module(model)
    _unswap(model, list(all_swapped(model)))
    _huggingface.restore_configs(model)
    return model


def refresh(model: nn.Module) -> nn.Module:
    """Drops the laid-out weights and CUDA graphs of ``model``; the next forward makes them anew, from what is then."""
    _check_module(model)
    _layouts.drop(model)
    return model


@contextlib.contextmanager
def optimized(model: nn.Module, **options) -> Iterator[nn.Module]:
    """``optimize(model, **options)`` for the length of a ``with`` block; reverted even after an exception.

    A model that was optimised already keeps what it had and is left with it.
    """
    _check_module(model)
    before = {module: swapped(module) for _, module in all_swapped(model)}
    configs = _huggingface.adopters(model)
    optimize(model, **options)
    try:
        yield model
    finally:
        if before:
            optimize(model)  # it may have been reverted in the block
            _unswap(model, [(path, m) for path, m in all_swapped(model) if m not in before])
            _huggingface.restore_configs(model, keep=configs)
            for module, done in before.items():
                reconfigure(module, done.options)
        else:
            revert(model)


def _unswap(model: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
    """The original classes of some modules of ``model``, by path; or an error, and all stay as they are."""
    foreign = [
        f"{path or 'model'} ({type(m).__qualname__})"
        for path, m in modules
        if type(m) is not swapped(m).standin
    ]
    if foreign:
        raise RuntimeError(
            f"model: expected the classes that optimize set, got others in {', '.join(foreign)}"
        )
    _layouts.drop(model)
    for _, module in modules:
        unswap(module)


def _checked_options(
    model: nn.Module, backend: str | None, remove_padding: bool | str, cuda_graphs: bool
) -> Options:
    _check_module(model)
    if not isinstance(remove_padding, bool) and remove_padding != "auto":
        raise ValueError(f"remove_padding: expected 'auto', True or False, got {remove_padding!r}")
    if not isinstance(cuda_graphs, bool):
        raise ValueError(f"cuda_graphs: expected True or False, got {cuda_graphs!r}")
    devices = {p.device.type for p in model.parameters()}
    if cuda_graphs and devices != {"cuda"}:
        found = f"parameters on {' and '.join(sorted(devices))}" if devices else "no parameters"
        raise ValueError(f"cuda_graphs: expected False, or a model on a CUDA device, got True and {found}")
    if backend is not None and checked(backend, "backend") != "auto":
        reasons = {op: _registry.why_not(backend, op) for op in _registry.ops()}
        if all(reasons.values()):
            every = dict.fromkeys(reason for found in reasons.values() for reason in found)
            raise BackendError(f"backend {backend!r} cannot be used: " + "; ".join(every))
    return Options(backend, remove_padding, CudaRecorder if cuda_graphs else None)


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
