"""A training step with activations kept, or computed once more: memory against time.

    python -m pytorch_ext.benchmarks.bench_recompute [--layers 6 --hidden 384 --batch 16 --seqlen 256 --fill 0.27]

For each way: the activations that wait for the backward pass, the peak of a step in a fresh process (above weights and
gradients), and its time, all ways in turn. The first row is the model that was not optimised.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pytorch_ext
from pytorch_ext.models import BertConfig, BertForSequenceClassification
from pytorch_ext.testing import padding_mask
from pytorch_ext.training import recompute

from . import timing

WAYS = ("original", "all", "selective", "layers")
Batch = dict[str, Tensor]


class _Storages(TorchDispatchMode):
    """What was allocated within, and may be freed by now."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result


def kept_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes that a forward pass of ``model`` leaves for its backward pass, beside weights and inputs."""
    there = [*model.parameters(), *model.buffers(), *batch.values()]
    before = {t.untyped_storage()._cdata for t in there}
    with _Storages() as found:
        loss = model(**batch).loss
    alive = (size for place, (ref, size) in found.seen.items() if place not in before and not ref.expired())
    total = sum(alive)
    del loss  # it holds them
    return total


def make_step(way: str, sizes: dict[str, Any]) -> Callable[[], None]:
    """Forward and backward of one way, ready to run; its ``model`` and ``batch`` are attributes."""
    torch.set_num_threads(sizes["threads"])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000,  # a larger table costs all ways alike, and hides how they differ
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["hidden"] // 32,
        intermediate_size=4 * sizes["hidden"],
    )
    model = BertForSequenceClassification(config).train()
    if way != "original":
        recompute(pytorch_ext.optimize(model), None if way == "all" else way)
    batch, seqlen = sizes["batch"], sizes["seqlen"]
    longest = seqlen * sizes["fill"] * 2 - 1  # of lengths that are spread evenly
    lengths = [max(1, min(seqlen, round(longest * (n + 0.5) / batch))) for n in range(batch)]
    lengths[-1] = seqlen
    real = padding_mask(lengths, seqlen)
    inputs = {
        "input_ids": torch.randint(1, config.vocab_size, real.shape),
        "attention_mask": real.long(),
        "labels": torch.randint(0, 2, (batch,)),
    }

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(**inputs).loss.backward()

    step.model, step.batch = model, inputs
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 6), ("hidden", 384), ("batch", 16), ("seqlen", 256), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--fill", type=float, default=0.27)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    sizes = vars(options)

    steps = {way: make_step(way, sizes) for way in WAYS}
    kept = {way: kept_bytes(step.model, step.batch) for way, step in steps.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[way].append(time.perf_counter() - start)
    real = steps["all"].batch["attention_mask"]
    print(
        f"{options.layers} layers of {options.hidden}, {options.batch} x {options.seqlen} positions,"
        f" {real.float().mean():.0%} of them real; fp32, dropout 0.1, {options.threads} threads"
    )
    print(f"  {'':10}  {'kept':>10}  {'peak of a step':>14}  {'time of a step':>14}")
    for way in WAYS:
        memory = timing.peak_memory(make_step, way, sizes)
        peak = "unknown" if memory is None else f"{memory.bytes / 2**20:.0f} MiB"
        # The first round warms up.
        took = statistics.median(seconds[way][1:])
        more = statistics.median(a / b for a, b in zip(seconds[way][1:], seconds["all"][1:], strict=True))
        print(
            f"  {way:10}  {kept[way] / 2**20:>6.1f} MiB  {peak:>14}  {took * 1e3:>7.0f} ms, {more:.2f} x",
            flush=True,
        )


if __name__ == "__main__":
    main()
