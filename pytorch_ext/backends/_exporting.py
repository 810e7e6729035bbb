"""Whether a model is traced for a file that others read: then every op is PyTorch's own and padding stays."""

import contextlib
from collections.abc import Iterator

import torch

_portable = False


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Inside, ``torch.export`` traces what anybody can run, without this package and at any batch and length.

    A plain call keeps its padding too, and is what the traced graph has to agree with.
    """
    global _portable
    before, _portable = _portable, True
    try:
        yield
    finally:
        _portable = before


def exporting() -> bool:
    # PyTorch takes nearly 2 µs to say whether it exports, so it is asked where something traces alone.
    return _portable or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())
