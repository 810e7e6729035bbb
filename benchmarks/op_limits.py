"""What the machine itself can do: the rates of copying and of multiplying matrices, which no op can beat for long."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # of one tensor: larger than the caches
LARGEST_PRODUCT = {"cpu": 2048, "cuda": 8192}
PRODUCT_SECONDS = 0.15
SAMPLES = 3  # before a case, and after it


@dataclass(frozen=True)
class Rates:
    """Bytes moved (read and written) and operations (two per multiply-add) per second."""

    copy: float
    product: float
    product_dtype: str  # the faster of float32 and the dtype of the case


@dataclass(frozen=True)
class Cost:
    """What one call must move and compute, however it is done."""

    bytes: float
    flops: float = 0.0

    def limit(self, seconds: float, rates: Rates) -> tuple[str, float, float]:
        """The unit of what binds this op on this machine, the rate that `seconds` is, and the machine's own."""
        if self.flops / rates.product > self.bytes / rates.copy:
            return "GFLOP/s", self.flops / seconds / 1e9, rates.product / 1e9
        return "GB/s", self.bytes / seconds / 1e9, rates.copy / 1e9


class Limits:
    """Measures the rates again and again, between the cases.

    Not among the contenders of a case: a copy larger than the caches would empty them for the one that comes next.
    """

    def __init__(self, device: torch.device | str, dtypes: list[torch.dtype]) -> None:
        self.device = torch.device(device)
        kind = self.device.type
        self._from = torch.rand(COPY_BYTES[kind] // 4, device=self.device)
        self._to = torch.empty_like(self._from)
        self._copies: list[float] = []
        self._products: dict[torch.dtype, list[float]] = {}
        self._factors: dict[torch.dtype, torch.Tensor] = {}
        for dtype in {torch.float32, *dtypes}:
            self._factors[dtype] = self._factor(dtype, LARGEST_PRODUCT[kind])

    def start(self) -> None:
        """Forget what was measured beside the case before."""
        self._copies, self._products = [], {dtype: [] for dtype in self._factors}

    def sample(self, dtype: torch.dtype, products: bool) -> None:
        """Measure once more; products only where the case has some, as they take longer."""
        moved = 2 * self._from.nbytes
        self._copies += [moved / self._seconds(lambda: self._to.copy_(self._from)) for _ in range(SAMPLES)]
        for kind in {torch.float32, dtype} if products else ():
            self._products[kind] += [self.product_rate(kind) for _ in range(SAMPLES)]

    def rates(self, dtype: torch.dtype) -> Rates:
        """The best since `start`: what disturbs the machine takes from its rates and never adds to them."""
        found = {kind: max(rates) for kind, rates in self._products.items() if rates}
        best = max(found, key=found.__getitem__, default=dtype)
        name = str(best).removeprefix("torch.")
        return Rates(max(self._copies), found.get(best, float("inf")), name)

    def product_rate(self, dtype: torch.dtype) -> float:
        """Operations per second of one large torch.mm."""
        factor = self._factors[dtype]
        return 2 * factor.shape[0] ** 3 / self._seconds(lambda: torch.mm(factor, factor))

    def _factor(self, dtype: torch.dtype, largest: int) -> torch.Tensor:
        """As large as it may be without taking long: some processors have no units for some dtypes."""
        size = 256
        while True:
            factor = torch.randn(size, size, device=self.device).to(dtype)
            torch.mm(factor, factor)
            if size == largest or 8 * self._seconds(lambda f=factor: torch.mm(f, f)) > PRODUCT_SECONDS:
                return factor
            size *= 2

    def _seconds(self, call: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        call()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
