"""The original and the optimised model making the same steps in turn: for the examples that compare the two."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

WARM_UP = 3  # steps that are not timed


def steps(text: str) -> int:
    """For argparse: enough of them to time some."""
    if not text.isdecimal() or int(text) < WARM_UP + 2:
        raise argparse.ArgumentTypeError(f"expected a number of at least {WARM_UP + 2}, got {text}")
    return int(text)


class Run:
    """A model, its optimiser, and what its steps gave."""

    def __init__(self, model: nn.Module, steps: int, rate: float) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
        warm = max(1, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: dict[str, Tensor]) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()

    @property
    def last_loss(self) -> float:
        return statistics.mean(self.losses[-20:])


def take_turns(
    original: Run, fast: Run, batches: Iterator[dict], steps: int, more: Callable[[Run], str] = lambda run: ""
) -> None:
    """Makes the steps and prints what they gave; ``more`` says what else there is to say of a run."""
    real = positions = 0
    for step in range(steps):
        batch = next(batches)
        for run in (original, fast) if step % 2 else (fast, original):
            run.step(batch)
        real += batch["attention_mask"].sum().item()
        positions += batch["attention_mask"].numel()
        if (step + 1) % max(1, steps // 10) == 0:
            print(
                f"  step {step + 1} of {steps}: loss {original.last_loss:.4f}, {fast.last_loss:.4f}",
                flush=True,
            )
    print(f"{steps} steps, {real / positions:.0%} of all positions were real tokens")
    for name, run in (("original", original), ("optimised", fast)):
        speed = real / steps / statistics.median(run.seconds[WARM_UP:])
        print(
            f"  {name:9}  loss of the last 20 steps {run.last_loss:.4f}  {speed:,.0f} tokens/s{more(run)}",
            flush=True,
        )
    apart = max(abs(a - b) for a, b in zip(original.losses, fast.losses, strict=True))
    pairs = zip(original.seconds[WARM_UP:], fast.seconds[WARM_UP:], strict=True)
    low, middle, high = statistics.quantiles((slow / quick for slow, quick in pairs), n=4)
    print(f"  losses differ by at most {apart:.1e}")
    print(f"  {middle:.2f} x as many tokens/s (median of pairs; half of them lie in {low:.2f} to {high:.2f})")


def draw(original: Run, fast: Run, title: str, path: Path) -> None:
    """Both curves of losses."""
    import matplotlib

    matplotlib.use("Agg")  # a file is written, no window opened
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.plot(original.losses, color="#d9822b", linewidth=4, alpha=0.45, label="original")
    axes.plot(fast.losses, color="#0f9d76", linewidth=1, label="optimised")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    print(f"written: {path}")
