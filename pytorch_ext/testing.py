"""How right is right: the numerical contract, shared by tests and benchmarks.

A result is compared with float64 on the same (already rounded) inputs, and its error is held against that of eager
PyTorch in the same dtype: over at least four seeds the rms error may be 1.25 times eager's and the largest error twice
eager's, plus ``eps * max|exact|``. So a tolerance is never chosen, and a wrong reference cannot hide behind one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

RMS_FACTOR = 1.25
LARGEST_FACTOR = 2.0
SEEDS = (0, 1, 2, 3)

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Inputs = Mapping[str, Tensor]


@dataclass
class Error:
    """The error of a result against float64, gathered over seeds."""

    squares: float = 0.0
    count: int = 0
    largest: float = 0.0
    scale: float = 0.0  # the largest exact value
    unequal: int = 0  # places where one is finite and the other is not, or the infinities or NaN differ

    def add(self, result: Tensor, exact: Tensor) -> None:
        if result.shape != exact.shape:
            raise AssertionError(f"expected shape {tuple(exact.shape)}, got {tuple(result.shape)}")
        result, exact = result.detach().double(), exact.detach().double()
        finite = exact.isfinite() & result.isfinite()
        same = (result == exact) | (result.isnan() & exact.isnan())
        self.unequal += int((~finite & ~same).sum())
        difference = (result - exact)[finite].abs()
        self.count += difference.numel()
        if difference.numel():
            self.squares += float(difference.square().sum())
            self.largest = max(self.largest, float(difference.max()))
            self.scale = max(self.scale, float(exact[finite].abs().max()))

    @property
    def rms(self) -> float:
        return (self.squares / self.count) ** 0.5 if self.count else 0.0


@dataclass
class Comparison:
    """Errors of ours and of eager PyTorch, by the name of the output or gradient."""

    dtype: torch.dtype
    ours: dict[str, Error] = field(default_factory=dict)
    eager: dict[str, Error] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """What breaks the contract, as sentences; empty if nothing does."""
        found = []
        for name, ours in self.ours.items():
            eager = self.eager[name]
            slack = torch.finfo(self.dtype).eps * ours.scale
            for kind, factor in (("rms", RMS_FACTOR), ("largest", LARGEST_FACTOR)):
                got, limit = getattr(ours, kind), factor * getattr(eager, kind) + slack
                if not got <= limit:
                    found.append(
                        f"{name}: {kind} error {got:.3g} is above {limit:.3g} (eager {getattr(eager, kind):.3g})"
                    )
            if ours.unequal > eager.unequal:
                found.append(
                    f"{name}: {ours.unequal} values are finite on one side alone (eager {eager.unequal})"
                )
        return found


def compare(
    ours: Function,
    eager: Function,
    make: Callable[[torch.Generator], Inputs],
    dtype: torch.dtype,
    *,
    gradients: bool = True,
    seeds: Sequence[int] = SEEDS,
    exact: Function | None = None,
) -> Comparison:
    """Runs ``ours``, ``eager`` and ``exact`` (``eager`` in float64 unless given) on the inputs that ``make`` makes.

    ``make`` gets a seeded generator and returns named tensors, the floating ones in float64; they are rounded to
    ``dtype`` first, so that all three see the same numbers. With ``gradients`` those of every floating input count too,
    for one random gradient of the outputs.
    """
    options = {"gradients": gradients, "seeds": seeds, "exact": exact}
    return compare_all({"ours": ours}, eager, make, dtype, **options)["ours"]


def compare_all(
    functions: Mapping[str, Function],
    eager: Function,
    make: Callable[[torch.Generator], Inputs],
    dtype: torch.dtype,
    *,
    gradients: bool = True,
    seeds: Sequence[int] = SEEDS,
    exact: Function | None = None,
) -> dict[str, Comparison]:
    """``compare`` for several implementations of one op, which share the runs of ``eager`` and ``exact``."""
    of_eager: dict[str, Error] = {}
    comparisons = {name: Comparison(dtype, eager=of_eager) for name in functions}
    sides = [(of_eager, eager), *((comparisons[name].ours, f) for name, f in functions.items())]
    for seed in seeds:
        inputs = {name: _rounded(t, dtype) for name, t in make(torch.Generator().manual_seed(seed)).items()}
        doubles = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        truth = _outputs(exact or eager, doubles, gradients, seed, dtype)
        for side, function in sides:
            results = _outputs(function, inputs, gradients, seed, dtype)
            if results.keys() != truth.keys():
                raise AssertionError(f"expected {', '.join(truth)}, got {', '.join(results)}")
            for name, result in results.items():
                side.setdefault(name, Error()).add(result, truth[name])
    return comparisons


def assert_contract(*args, **kwargs) -> None:
    """``compare``, failing with every sentence of what breaks the contract."""
    failures = compare(*args, **kwargs).failures()
    assert not failures, "\n".join(failures)


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """Normal float64 numbers, the inputs of most tests; never zeros, never constant."""
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale + offset


# The regimes of the contract: ordinary numbers, large and tiny ones, and rows far from zero.
REGIMES: dict[str, dict[str, float]] = {
    "normal": {},
    "large": {"scale": 1e4},
    "tiny": {"scale": 1e-4},
    "offset": {"offset": 1e3},
}


def cumulative(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """``cu_seqlens`` of sequences of these lengths: int32 ``(batch + 1,)``."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def padding_mask(lengths: Sequence[int], seqlen: int, device: torch.device | str = "cpu") -> Tensor:
    """Attention mask of right-padded sequences: bool ``(batch, seqlen)``, True at real tokens."""
    return torch.arange(seqlen, device=device) < torch.tensor(lengths, device=device)[:, None]


def _rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() else t


def _outputs(
    function: Function, inputs: Inputs, gradients: bool, seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    leaves = {
        name: t.detach().clone().requires_grad_(gradients) if t.is_floating_point() else t
        for name, t in inputs.items()
    }
    result = function(**leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    named = {f"output {i}": t for i, t in enumerate(outputs)}
    if gradients:
        generator = torch.Generator().manual_seed(seed + 1000)
        # Rounded to the dtype, so that ours, eager and exact are all given the same gradient.
        weights = [normal(generator, *t.shape).to(dtype).to(t) for t in outputs]
        wanted = {name: t for name, t in leaves.items() if t.is_floating_point()}
        found = torch.autograd.grad(outputs, list(wanted.values()), weights, allow_unused=True)
        for (name, leaf), gradient in zip(wanted.items(), found, strict=True):
            named[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return named
