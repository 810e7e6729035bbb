"""The same texts in batches as they come, sorted by length, and by tokens: what a careful user does already.

Every contender works through all texts; the baseline takes them as they come. Hidden states are compared text by text,
in training the loss and the gradients of all texts, which no way of batching changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from . import bench_bert, timing
from .bert_contenders import BASELINE, Case, autocast, contenders, hugging_face
from .console import Progress, reason

COME, SORTED, BUDGET = "as they come", "sorted", "by tokens"
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Texts:
    """So many texts for the model of `case`, at most as long as its sequences; a batch holds as many, or as much."""

    case: Case
    count: int

    @cached_property
    def lengths(self) -> list[int]:
        """As those of sentences and paragraphs: log-normal, 27 % of the longest on average."""
        draw = torch.Generator().manual_seed(self.case.seed)
        spread = torch.randn(self.count, generator=draw).mul(0.8).exp()
        longest = self.case.seq
        return [max(4, min(longest, round(0.2 * longest * factor))) for factor in spread.tolist()]

    @cached_property
    def rows(self) -> list[torch.Tensor]:
        """The ids of each text."""
        draw = torch.Generator().manual_seed(self.case.seed)
        return [torch.randint(1000, 30522, (length,), generator=draw) for length in self.lengths]

    def order(self, how: str) -> list[list[int]]:
        """The numbers of the texts in each batch."""
        numbers = list(range(self.count))
        if how != COME:
            numbers.sort(key=self.lengths.__getitem__, reverse=True)
        if how != BUDGET:
            size = self.case.batch
            return [numbers[at : at + size] for at in range(0, self.count, size)]
        # As many positions as the longest texts take when they are batched by number.
        most, batches = self.case.batch * self.lengths[numbers[0]], [[]]
        for number in numbers:
            longest = self.lengths[(batches[-1] or [number])[0]]
            if (len(batches[-1]) + 1) * longest > most:
                batches.append([])
            batches[-1].append(number)
        return batches

    def positions(self, how: str) -> int:
        """Of all batches, with their padding."""
        return sum(len(batch) * max(self.lengths[number] for number in batch) for batch in self.order(how))

    def batches(self, how: str) -> list[Batch]:
        return [self._batch(numbers) for numbers in self.order(how)]

    def _batch(self, numbers: list[int]) -> Batch:
        ids = nn.utils.rnn.pad_sequence([self.rows[number] for number in numbers], batch_first=True)
        mask = (ids != 0).long()
        batch = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}
        if self.case.training:
            batch["labels"] = torch.tensor([number % 2 for number in numbers])
        return {name: tensor.to(self.case.device) for name, tensor in batch.items()}


def outputs(model: nn.Module, work: Texts, how: str) -> Batch:
    """What is compared: the hidden states of each text, or the loss and the gradients of them all."""
    if work.case.training:
        return _gradients(model, work, how)
    found = {}
    with torch.no_grad():
        for numbers, batch in zip(work.order(how), work.batches(how), strict=True):
            hidden = model(**batch).last_hidden_state
            found |= {
                number: row[: work.lengths[number]] for number, row in zip(numbers, hidden, strict=True)
            }
    return {"hidden states": torch.cat([found[number] for number in range(work.count)])}


def _gradients(model: nn.Module, work: Texts, how: str) -> Batch:
    total = 0.0
    model.zero_grad(set_to_none=True)
    for batch in work.batches(how):
        with autocast(work.case):
            loss = model(**batch).loss * (len(batch["labels"]) / work.count)
        loss.backward()
        total += loss.detach()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": total, **found}


def runner(model: nn.Module, case: Case, batches: list[Batch]) -> Callable[[Any], None]:
    """What is timed: all batches once."""
    call = bench_bert.runner(model, case)

    def run(_: Any) -> None:
        for batch in batches:
            call(batch)

    return run


def run(
    work: Texts, names: list[str], pairs: int, progress: Progress
) -> tuple[list[bench_bert.Row], timing.Timings | None]:
    """Each contender with each way to batch, compared with the baseline on texts as they come, then timed."""
    case, known = work.case, contenders(work.case)
    precise = Case(**{**vars(case), "dtype": torch.float32}) if case.training else case
    progress.start("the precise run that shows what rounding explains")
    truth = outputs(
        hugging_face(precise, dtype=timing.precision_up(case.dtype)), Texts(precise, work.count), COME
    )
    want = outputs(known[BASELINE][1](case, 0.0), work, COME)
    limits = timing.rounding_limits(want, truth)
    rows = []
    for name in names:
        what, build = known[name]
        ready = None
        try:
            model = build(case, 0.0)
        except Exception as error:
            rows.append(bench_bert.Row(name, what, reason(error)))
            continue
        for how in (COME, SORTED, BUDGET):
            row = bench_bert.Row(name if how == COME else f"{name}, {how}", f"{what}; texts {how}")
            rows.append(row)
            progress.start(f"{row.name}: {what}")
            start = time.perf_counter()
            try:
                got = outputs(model, work, how)
            except Exception as error:
                row.note = reason(error)
                continue
            row.first_call_seconds = time.perf_counter() - start
            row.agreement = None if row.name == BASELINE else bench_bert.agreement(got, want, limits)
            if not row.red:
                ready = ready or (build(case, bench_bert.DROPOUT) if case.training else model)
                row.run = runner(ready, case, work.batches(how))
    return rows, bench_bert.measure(rows, case, {}, pairs, progress)
