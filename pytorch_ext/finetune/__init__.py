"""``pytorch-ext finetune``: an encoder becomes a text classifier, from a CSV or JSON-lines file.

The engine is Hugging Face's Trainer; what is ours are the kernels, the removal of padding, and batches by their real
tokens. ``run`` is the whole of it; beside it stand ``options``, ``data`` (read and split), ``batches``, ``tune`` (which
weights learn), ``engine`` (the Trainer, and checkpoints that a kill cannot spoil), ``metrics`` and ``page``.
"""

from __future__ import annotations

from collections.abc import Callable

from .options import FinetuneError, Options

__all__ = ["FinetuneError", "Options", "run"]


def run(options: Options, say: Callable[[str], object] = print) -> dict:
    """Fine-tune, or go on where a killed run was; the report as a dictionary. Bad input raises `FinetuneError`."""
    try:
        from .whole import whole  # only now: it needs transformers, and the options do not
    except ModuleNotFoundError as error:
        raise FinetuneError(f"{error.name} is not installed: pip install 'pytorch-ext[train]'") from None
    return whole(options, say)
