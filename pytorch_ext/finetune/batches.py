"""Batches that hold about equally many real tokens, however long the texts in them are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler


class Texts(Dataset):
    """Tokenised texts and the numbers of their classes."""

    def __init__(self, tokens: list[dict[str, list[int]]], labels: list[int]) -> None:
        self.tokens, self.labels = tokens, labels

    @property
    def lengths(self) -> list[int]:
        return [len(tokens["input_ids"]) for tokens in self.tokens]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.tokens[number], "labels": self.labels[number]}


class TokenBudget(Sampler[list[int]]):
    """Cuts the texts, in a new order each epoch, into batches of about as many real tokens.

    Padding costs an optimised model nothing, so texts need not be sorted by length, which would make batches alike. The
    number of batches is the same in every epoch: the texts are laid end to end, and the line is cut into equal parts.

    Args:
        lengths: of the texts, in tokens.
        tokens: of a batch, on average at most; no batch has more than that and the longest text. At least twice the
            longest, so that no batch is empty.
        seed: None keeps the order.
    """

    def __init__(self, lengths: list[int], tokens: int, seed: int | None = None) -> None:
        if lengths and tokens < 2 * max(lengths):
            raise ValueError(
                f"tokens: expected at least twice the longest text, {max(lengths)}, got {tokens}"
            )
        self.lengths, self.seed, self.epoch = lengths, seed, 0
        self.count = math.ceil(sum(lengths) / tokens)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        order = range(len(self.lengths))
        if self.seed is not None:
            # A generator of its own: a resumed run draws the same order without what was drawn before.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
        share = sum(self.lengths) / max(self.count, 1)
        batch, place, end = [], 0, 0
        for number in order:
            middle = end + self.lengths[number] / 2
            end += self.lengths[number]
            if middle >= (place + 1) * share:
                yield batch
                batch, place = [], place + 1
            batch.append(number)
        if batch:
            yield batch


def fill(lengths: list[int], batches: list[list[int]]) -> float:
    """The share of real tokens where each batch is padded to its longest text."""
    positions = sum(len(batch) * max(lengths[n] for n in batch) for batch in batches)
    return sum(lengths) / positions
