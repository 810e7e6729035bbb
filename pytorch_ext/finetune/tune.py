"""Which weights of a classifier learn: all, the last layers, adapters, or those that the task's gradients ask for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .options import FinetuneError

EMBEDDINGS = "embeddings"
SHARE = 0.5  # of all scores, that the chosen layers have together


def groups(model: Any) -> dict[str, nn.Module]:
    """The embeddings and the layers of a Hugging Face classifier, by name, from the input up.

    What is in none of them (a pooler, the head) always learns.
    """
    base, count = model.base_model, getattr(model.config, "num_hidden_layers", None)
    lists = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise FinetuneError(f"model: expected an encoder with a list of layers, got {type(model).__name__}")
    below = getattr(base, EMBEDDINGS, None) or base.get_input_embeddings()
    return {EMBEDDINGS: below, **{f"layer {number}": layer for number, layer in enumerate(lists[0])}}


def freeze(model: Any, learn: Iterable[str]) -> None:
    """Only the groups named in ``learn`` learn, and the head."""
    learn = set(learn)
    for name, module in groups(model).items():
        module.requires_grad_(name in learn)


def last(model: Any, count: int) -> list[str]:
    """The names of the last layers."""
    names = list(groups(model))
    if count > len(names) - 1:
        raise FinetuneError(
            f"tune: expected at most last:{len(names) - 1}, the model's layers, got last:{count}"
        )
    return names[-count:]


def scores(model: Any, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
    """How much each group would move for this task: its gradient's norm over its weights', the mean over batches.

    The relative gradient norm of Lee et al. 2022 ("Surgical fine-tuning", arXiv 2210.11466). Dropout is off.
    """
    found = groups(model)
    training = model.training
    model.eval()
    sums = dict.fromkeys(found, 0.0)
    count = 0
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, module in found.items():
            pairs = [(p.grad, p) for p in module.parameters() if p.grad is not None]
            gradient, weight = (nn.utils.get_total_norm(tensors) for tensors in zip(*pairs, strict=True))
            sums[name] += (gradient / weight).item()
        count += 1
    model.zero_grad()
    model.train(training)
    return {name: total / count for name, total in sums.items()}


def choose(scored: dict[str, float]) -> list[str]:
    """The fewest groups whose scores make up half of all, from the input up."""
    wanted, chosen = SHARE * sum(scored.values()), []
    for name in sorted(scored, key=scored.__getitem__, reverse=True):
        chosen.append(name)
        wanted -= scored[name]
        if wanted <= 0:
            break
    return [name for name in scored if name in chosen]


def lora(model: Any) -> Any:
    """The classifier with adapters of rank 8 in the linear layers of its encoder (Hu et al. 2021, arXiv 2106.09685)."""
    import peft

    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear"
    )
    return peft.get_peft_model(model, config)


def learning(model: nn.Module) -> tuple[int, int]:
    """How many weights learn, and how many there are."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
