"""Three ways to run one encoder, compared on the same batches and then timed against each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pytorch_ext
from pytorch_ext.benchmarks import timing
from pytorch_ext.benchmarks.console import reason

from .batches import Batch, Series
from .model import load_model

EAGER = "eager"
COMPILED = "torch.compile"
OURS = "pytorch-ext"


@dataclass(frozen=True)
class Setting:
    """What all contenders have in common."""

    folder: Path
    device: torch.device
    dtype: torch.dtype
    backend: str | None = None


@dataclass
class Contender:
    """One way to run the encoder; without a `model` it is not there, and `note` says why."""

    name: str
    model: Any = None
    note: str = ""
    first_call: float = 0.0  # seconds; for torch.compile it is the time to compile
    agreement: timing.Agreement | None = None  # with the baseline, which has none itself
    memory: timing.Memory | None = None

    @property
    def usable(self) -> bool:
        """Whether it may be timed."""
        return self.model is not None and not self.red

    @property
    def red(self) -> bool:
        return self.agreement is not None and not self.agreement.ok


def contenders(setting: Setting, *, compiled: bool = True) -> list[Contender]:
    """Fresh copies of the model, one each: they share no weights and no state. The first is the baseline."""
    names = [EAGER, *([COMPILED] if compiled else []), OURS]
    return [Contender(name, build(name, setting)) for name in names]


def build(name: str, setting: Setting) -> Any:
    """Load the model and make it the contender of that name."""
    model = load_model(setting.folder, setting.device, setting.dtype)
    if name == COMPILED:
        return torch.compile(model, dynamic=True)
    return pytorch_ext.optimize(model, backend=setting.backend) if name == OURS else model


def pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Normalised means over the real tokens, one sentence embedding per text: (B, S, D), (B, S) -> (B, D)."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean.float(), dim=-1)


def embed(model: Any, batch: Batch) -> torch.Tensor:
    """The sentence embeddings of a batch: this is what is timed."""
    with torch.no_grad():
        return pool(model(**batch.inputs).last_hidden_state, batch.inputs["attention_mask"])


def outputs(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """What is compared: the hidden states at real positions, and the embeddings."""
    with torch.no_grad():
        hidden = model(**batch.inputs).last_hidden_state
        embeddings = pool(hidden, batch.inputs["attention_mask"])
    return {"hidden states": hidden[batch.mask], "embeddings": embeddings}


def first_calls(field: list[Contender], batch: Batch, progress: Callable[[], object]) -> None:
    """Run each contender once. torch.compile compiles now; where it cannot, it leaves and says why."""
    for contender in field:
        start = time.perf_counter()
        try:
            outputs(contender.model, batch)
        except Exception as error:
            if contender.name != COMPILED:
                raise
            contender.model, contender.note = None, f"not available here: {reason(error)}"
        contender.first_call = time.perf_counter() - start
        progress()


def seconds_per_position(field: list[Contender], batch: Batch) -> float:
    """What one position costs all contenders together, from one warm call each; it only sizes the runs."""
    present = {contender.name: contender.model for contender in field if contender.model is not None}
    calls = {name: (lambda item, model=model: embed(model, item)) for name, model in present.items()}
    taken = timing.interleave(calls, [batch], rounds=1, warmup=0, device=batch.mask.device)
    return sum(taken.median(name) for name in calls) / batch.positions


def rounding(setting: Setting, batches: list[Batch], baseline: Contender) -> dict[Any, float]:
    """What rounding explains: the baseline's distance from the same model one precision up."""
    truth = load_model(setting.folder, setting.device, setting.dtype).to(timing.precision_up(setting.dtype))
    limits: dict[Any, float] = {}
    for batch in batches:
        here = timing.rounding_limits(outputs(baseline.model, batch), outputs(truth, batch))
        limits = {name: max(limit, limits.get(name, 0.0)) for name, limit in here.items()}
    return limits


def check(field: list[Contender], batch: Batch, limits: dict[Any, float]) -> None:
    """Compare every contender with the baseline on one batch, and keep the worst of all batches so far."""
    baseline, *others = field
    want = outputs(baseline.model, batch)
    for contender in others:
        if contender.model is not None:
            agreement = timing.compare(outputs(contender.model, batch), want, limits)
            contender.agreement = agreement.worse(contender.agreement or agreement)


def measure(series: Series, field: list[Contender], seconds: float, progress: Callable[[], object]) -> None:
    """Time the contenders that agree, in turn, on every batch of the series."""
    models = {contender.name: contender.model for contender in field if contender.usable}
    series.timings = timing.interleave(
        {name: (lambda batch, model=model: embed(model, batch)) for name, model in models.items()},
        series.batches,
        rounds=50,
        warmup=0,  # the comparison has just run every contender on every batch
        seconds=seconds,
        device=series.batches[0].mask.device,
        progress=progress,
    )


def removes_padding(model: Any, batch: Batch) -> bool:
    """Whether padded positions are left out of the work: only then do they come back as exact zeros."""
    with torch.no_grad():
        padded = model(**batch.inputs).last_hidden_state[~batch.mask]
    return bool(padded.numel()) and not padded.any().item()


def memory_probe(
    name: str, setting: Setting, threads: int, inputs: dict[str, list[Any]]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """For a fresh process: one contender and one batch, ready to be run (see ``timing.peak_memory``).

    Warmed up with the beginning of one text, which makes the layouts of weights and little scratch.
    """
    torch.set_num_threads(threads)
    model = build(name, setting)
    tensors = {key: torch.tensor(value, device=setting.device) for key, value in inputs.items()}
    batch = Batch(tensors, lengths=())
    short = Batch({key: tensor[:1, :8] for key, tensor in tensors.items()}, lengths=())
    return lambda: embed(model, short), lambda: embed(model, batch)
