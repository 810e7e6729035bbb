"""The sizes of a model and a batch: what kernels are compiled ahead for, and what ``pytorch-ext tune`` is given."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    batch: int = 16
    seqlen: int = 256
    hidden: int = 768
    heads: int = 12
    intermediate: int = 3072
    vocabulary: int = 30522
    dtype: torch.dtype = torch.bfloat16
    dropout_p: float = 0.0

    @property
    def tokens(self) -> int:
        return self.batch * self.seqlen

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads
