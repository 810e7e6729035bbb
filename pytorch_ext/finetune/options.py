"""What a run of ``pytorch-ext finetune`` can be told."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TUNES = "full, last:N, lora or auto"
LEARNING_RATES = {"full": 5e-5, "last": 1e-4, "auto": 1e-4, "lora": 5e-4}
PRECISIONS = ("auto", "fp32", "bf16")


class FinetuneError(Exception):
    """Bad input, in one sentence for the user."""


@dataclass(frozen=True)
class Options:
    """Every field but ``data`` has a default; None is worked out from the data or the machine."""

    data: Path
    model: Path | None = None
    text: str = "text"
    label: str = "label"
    validation: Path | None = None
    test: Path | None = None
    tune: str = "full"
    epochs: float = 3.0
    max_steps: int | None = None
    tokens_per_batch: int = 4096
    max_length: int = 256
    learning_rate: float | None = None
    accumulate: int = 1
    eval_steps: int | None = None
    patience: int = 3
    precision: str = "auto"
    device: str = "auto"
    dropout: float | None = None
    threads: int | None = None
    seed: int = 0
    optimize: bool = True
    out: Path = Path("finetune-output")

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "accumulate", "eval_steps", "patience", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise FinetuneError(f"{name}: expected a number above 0, got {value}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise FinetuneError(f"learning_rate: expected a number above 0, got {self.learning_rate}")
        if self.max_length < 8:
            raise FinetuneError(f"max_length: expected at least 8 tokens, got {self.max_length}")
        if self.tokens_per_batch < 2 * self.max_length:
            expected = f"at least twice max_length, {2 * self.max_length}"
            raise FinetuneError(f"tokens_per_batch: expected {expected}, got {self.tokens_per_batch}")
        if not re.fullmatch(r"full|lora|auto|last:[1-9]\d*", self.tune):
            raise FinetuneError(f"tune: expected {TUNES}, got {self.tune!r}")
        if self.precision not in PRECISIONS:
            raise FinetuneError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise FinetuneError(f"device: expected auto, cpu or cuda, got {self.device!r}")
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise FinetuneError(f"dropout: expected a probability from 0 up to 1, got {self.dropout}")
        if self.text == self.label:
            raise FinetuneError(f"label: expected another column than text, got {self.label!r} for both")

    @property
    def rate(self) -> float:
        """The learning rate: less of the model may move faster."""
        return self.learning_rate or LEARNING_RATES[self.tune.partition(":")[0]]
