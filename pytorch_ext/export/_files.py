"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ._errors import ExportError


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path of the same name to write to; what lies beside it at the end is moved to where ``path`` is.

    Weights may lie in a file of their own, named after the graph's: it is moved first, so that no graph lacks it.

    Raises:
        ExportError: the folder of ``path`` is not there or cannot be written to, or ``path`` is a folder.
    """
    if path.is_dir():
        raise ExportError(f"path: expected a file to write, got the folder {path}")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ExportError(f"path: cannot write to {path}: {error.strerror}") from None
    try:
        yield folder / path.name
        made = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
        for file in made:
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
