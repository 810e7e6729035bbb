"""Which configuration (tile sizes, warps, stages) a kernel runs with.

Each kernel file declares a ``Configs`` beside its kernels: a small table per architecture, made by reasoning and
compiled ahead of time, so that a first call compiles one version and measures none. ``pytorch-ext tune`` measures a
wider set and writes the best to a file; what stands there for this device, this Triton and this source of the kernel
goes before the table.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .launch import recorded
from .precision import INTERPRETED

# Each has a column in every table; a GPU of another architecture takes that of its kin. sm_86, sm_89 and sm_120 have
# less shared memory than sm_80 (99 KiB), so its configurations stay below that.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
CACHE = "PYTORCH_EXT_CACHE"

Constants = dict[str, int]
# Upper limits, one for each size that a configuration depends on, and the configuration up to there; None: no limit.
Row = tuple[tuple[int | None, ...], Constants]

_architecture: str | None = None


class Configs:
    """The configurations of one or more kernels that are launched with the same ones.

    Args:
        name: of the kernels, in the file of measured configurations and in reports.
        by: the names of the sizes that the choice depends on, such as ``("cols", "itemsize")``. They are classes of
            sizes, few of them (powers of two), because each is tuned apart.
        table: rows per architecture; the first one whose limits are all kept is taken, so the last has no limits.
        wider: the values that ``tune`` tries for each constant, in all combinations.
        kernels: the kernels, in a function, because they stand below in the file.
        fits: says of a configuration (and the sizes) whether it is worth trying.
    """

    every: dict[str, "Configs"] = {}

    def __init__(
        self,
        name: str,
        *,
        by: Sequence[str],
        table: Mapping[str, Sequence[Row]],
        wider: Mapping[str, Sequence[int]],
        kernels: Callable[[], Sequence[Any]],
        fits: Callable[[Constants, tuple[int, ...]], bool] = lambda constants, sizes: True,
    ):
        self.name, self.by, self.table, self.wider = name, tuple(by), table, wider
        self._kernels, self._fits = kernels, fits
        self._chosen: dict[tuple, Constants] = {}
        self._forced: Constants | None = None
        self.used: set[tuple[str, int]] = set()  # rows of the table that were taken for a named architecture
        self.asked: set[tuple[int, ...]] = set()  # sizes that were asked for since tune last looked
        Configs.every[name] = self

    def of(self, tensor: Tensor, *sizes: int) -> Constants:
        """The configuration for ``sizes`` on the device of ``tensor``; not to be changed by who gets it."""
        found = self._chosen.get((tensor.get_device(), *sizes))
        if found is None or _architecture or self._forced:
            found = self._choose(tensor.device, sizes)
        return found

    def _choose(self, device: torch.device, sizes: tuple[int, ...]) -> Constants:
        if self._forced is not None:
            self.asked.add(sizes)
            return self._forced
        if _architecture:
            return self.table[_architecture][self._row(_architecture, sizes)][1]
        found = self.tuned(device, sizes)
        if found is None:
            architecture = architecture_of(device)
            found = self.table[architecture][self._row(architecture, sizes)][1]
        index = device.index if device.index is not None else -1
        self._chosen[index, *sizes] = found
        return found

    def _row(self, architecture: str, sizes: tuple[int, ...]) -> int:
        for i, (limits, _) in enumerate(self.table[architecture]):
            if all(limit is None or size <= limit for size, limit in zip(sizes, limits, strict=True)):
                if _architecture:
                    self.used.add((architecture, i))
                return i
        raise LookupError(f"{self.name}: the table for {architecture} has no row for {sizes}")

    def tuned(self, device: torch.device, sizes: tuple[int, ...]) -> Constants | None:
        """What was measured as the best for these sizes, if it was."""
        if INTERPRETED or device.type != "cuda":
            return None
        entry = measured(torch.cuda.get_device_name(device)).get(self.name, {})
        if entry.get("source") != self.source:
            return None
        return entry.get("configs", {}).get(key_of(sizes))

    @functools.cached_property
    def source(self) -> str:
        """A digest of the kernels and all that they call."""
        return hashlib.sha256("".join(k.cache_key for k in self._kernels()).encode()).hexdigest()[:32]

    def candidates(self, sizes: tuple[int, ...]) -> list[Constants]:
        """What ``tune`` measures for ``sizes``: the whole product of ``wider``, as far as it fits."""
        product = itertools.product(*self.wider.values())
        found = [dict(zip(self.wider, values, strict=True)) for values in product]
        return [constants for constants in found if self._fits(constants, sizes)]

    @contextlib.contextmanager
    def forced(self, constants: Constants) -> Iterator[None]:
        """Inside, this configuration is taken for all sizes."""
        outer, self._forced = self._forced, constants
        try:
            yield
        finally:
            self._forced = outer

    def sizes_asked(self, call: Callable) -> set[tuple[int, ...]]:
        """For which sizes ``call`` asks; its launches are not made."""
        self.asked.clear()
        with recorded(), self.forced(self.table[ARCHITECTURES[0]][-1][1]):
            call()
        return set(self.asked)

    def forget(self) -> None:
        """Looks at the file again at the next call."""
        self._chosen.clear()
        measured.cache_clear()


def size_class(n: int, least: int = 16, most: int = 2**16) -> int:
    """The power of two from ``n`` on, within bounds: how sizes are told apart."""
    return min(max(1 << (max(n, 1) - 1).bit_length(), least), most)


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. Triton's own costs a microsecond, because kernels may call it too."""
    return -(-a // b)


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The column of the tables for a GPU; for the interpreter, which has no GPU, the first."""
    if device.type != "cuda":
        return ARCHITECTURES[0]
    major, _ = torch.cuda.get_device_capability(device)
    if major == 9:
        return "sm_90"
    # sm_100, sm_103 and sm_110 have tensor memory; sm_120 is like sm_89 in what matters here.
    return "sm_100" if major in (10, 11) else "sm_80"


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU: how many programs a grid needs to fill it. An H100's where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@contextlib.contextmanager
def for_architecture(name: str) -> Iterator[None]:
    """Inside, tables are read for this architecture, whatever is here."""
    global _architecture
    outer, _architecture = _architecture, name
    try:
        yield
    finally:
        _architecture = outer


# --- The file of measured configurations -----------------------------------------------------------------------


def key_of(sizes: tuple[int, ...]) -> str:
    return ",".join(map(str, sizes))


def file_for(device_name: str) -> Path:
    """Where the measured configurations of a kind of GPU lie, for the Triton that is installed."""
    folder = os.environ.get(CACHE)
    if not folder:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "pytorch_ext"
    name = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return Path(folder) / f"triton-{triton.__version__}-{name}.json"


@functools.cache
def measured(device_name: str) -> dict[str, dict]:
    """The entries of that file by the name of their ``Configs``; none where there is no file, or one that is broken."""
    file = file_for(device_name)
    try:
        text = file.read_text()
    except OSError:
        return {}
    try:
        return checked(json.loads(text))
    except ValueError as error:
        warnings.warn(f"{file} is not used: {error}; `pytorch-ext tune` writes it anew", stacklevel=2)
        return {}


def save(device_name: str, found: Mapping["Configs", Mapping[tuple[int, ...], Constants]]) -> Path:
    """Adds what was measured to the file, and drops what is there of kernels that have changed since."""
    file = file_for(device_name)
    try:
        old = checked(json.loads(file.read_text()))
    except (OSError, ValueError):
        old = {}
    entries = {
        name: entry
        for name, entry in old.items()
        if name in Configs.every and entry.get("source") == Configs.every[name].source
    }
    for configs, best in found.items():
        entry = entries.setdefault(configs.name, {"source": configs.source, "configs": {}})
        entry["configs"] |= {key_of(sizes): constants for sizes, constants in best.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"device": device_name, "triton": triton.__version__, "kernels": entries}
    # Beside it first: who reads it meanwhile finds the old file or the new one.
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as new:
        json.dump(content, new, indent=1)
    os.replace(new.name, file)
    for configs in Configs.every.values():
        configs.forget()
    return file


def checked(content: Any) -> dict[str, dict]:
    """The entries, if they are of the form that ``tune`` writes; a ``ValueError`` says where they are not."""
    entries = content.get("kernels") if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        raise ValueError("kernels: expected an object")
    for name, entry in entries.items():
        configs = entry.get("configs") if isinstance(entry, dict) else None
        fine = isinstance(configs, dict) and all(
            isinstance(c, dict) and all(type(v) is int for v in c.values()) for c in configs.values()
        )
        if not fine:
            raise ValueError(f"{name}: expected configs of integers")
    return entries
