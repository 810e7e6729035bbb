"""Data for BERT's pretraining (Devlin et al. 2018, arXiv 1810.04805, section 3.1): sentence pairs and masked tokens.

``train_wordpiece`` makes a vocabulary, ``pair_up`` makes pairs of documents, ``Masking`` makes batches of pairs for
``pytorch_ext.models.BertForPreTraining``, which projects onto the vocabulary at masked positions only.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import tokenizers

IGNORED = -100  # the label where nothing is to be predicted
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
AROUND = 3  # [CLS] and two [SEP]


def train_wordpiece(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """A lower-casing WordPiece tokenizer of at most ``size`` pieces, trained on ``texts`` by ``tokenizers``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Pair:
    """Two pieces of text as token ids, and whether the second stood behind the first."""

    first: list[int]
    second: list[int]
    follows: bool


def pair_up(documents: Sequence[Sequence[list[int]]], length: int, seed: int) -> list[Pair]:
    """Goes once through all documents, lists of sentences, and cuts them into pairs of at most ``length`` tokens.

    The three special tokens count. Sentences are taken until they fill the length, and cut in two somewhere. In half of
    the cases, and where there is one alone, the second part is a piece of another document; what it replaced is used
    again.

    Raises:
        ValueError: a length that has no room for two tokens, or fewer than two documents with sentences.
    """
    room = length - AROUND
    if room < 2:
        raise ValueError(f"length: expected at least {AROUND + 2}, got {length}")
    documents = [[s for s in document if s] for document in documents]
    documents = [document for document in documents if document]
    if len(documents) < 2:
        raise ValueError(f"documents: expected at least two that are not empty, got {len(documents)}")
    draw = random.Random(seed)
    pairs = []
    for number, document in enumerate(documents):
        start = 0
        while start < len(document):
            end, tokens = start, 0
            while end < len(document) and tokens < room:
                tokens += len(document[end])
                end += 1
            cut = draw.randint(start + 1, max(start + 1, end - 1))
            first, second = (list(chain(*document[part])) for part in (slice(start, cut), slice(cut, end)))
            follows = bool(second) and draw.random() < 0.5
            if not follows:
                second, end = _elsewhere(documents, number, room - min(len(first), room - 1), draw), cut
            pairs.append(_cut(first, second, follows, room, draw))
            start = end
    draw.shuffle(pairs)
    return pairs


def _elsewhere(
    documents: Sequence[Sequence[list[int]]], number: int, wanted: int, draw: random.Random
) -> list[int]:
    """Sentences of another document than that of ``number``, until there are ``wanted`` tokens or no more."""
    other = draw.randrange(len(documents) - 1)
    document = documents[other + (other >= number)]
    found: list[int] = []
    for sentence in document[draw.randrange(len(document)) :]:
        if len(found) >= wanted:
            break
        found += sentence
    return found


def _cut(first: list[int], second: list[int], follows: bool, room: int, draw: random.Random) -> Pair:
    """A pair of at most ``room`` tokens: as long as there are more, the longer piece loses one at either end."""
    both = [list(first), list(second)]
    while len(both[0]) + len(both[1]) > room:
        longer = max(both, key=len)
        longer.pop(0 if draw.random() < 0.5 else -1)
    return Pair(*both, follows)


@dataclass(frozen=True)
class Masking:
    """Makes a batch of pairs, with some tokens to be predicted.

    Of each pair's ordinary tokens ``rate`` are chosen, and at least one; 80 % of these become ``[MASK]``, 10 % any
    ordinary token, 10 % stay as they are.

    Attributes:
        vocabulary: how many ids there are.
        pad, cls, sep, mask: the ids of special tokens.
        special: the ids that are never chosen, nor drawn.
    """

    vocabulary: int
    pad: int
    cls: int
    sep: int
    mask: int
    special: tuple[int, ...]
    rate: float = 0.15

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0:
            raise ValueError(f"rate: expected a share above 0, at most 1, got {self.rate}")
        if len(set(self.special)) >= self.vocabulary:
            raise ValueError(
                f"special: expected fewer than all {self.vocabulary} ids, got {len(self.special)}"
            )

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, rate: float = 0.15) -> Masking:
        """With the ids of a tokenizer that has BERT's special tokens.

        Raises:
            ValueError: it lacks one.
        """
        ids = [tokenizer.token_to_id(token) for token in SPECIAL]
        if None in ids:
            missing = SPECIAL[ids.index(None)]
            raise ValueError(f"tokenizer: expected the tokens {' '.join(SPECIAL)}, got one without {missing}")
        pad, _, first, between, mask = ids
        return cls(tokenizer.get_vocab_size(), pad, first, between, mask, tuple(ids), rate)

    def batch(self, pairs: Sequence[Pair], generator: torch.Generator) -> dict[str, Tensor]:
        """What ``BertForPreTraining`` takes, each ``(batch, seqlen)``, and ``next_sentence_label`` ``(batch,)``."""
        rows = [[self.cls, *p.first, self.sep, *p.second, self.sep] for p in pairs]
        types = [[0] * (len(p.first) + 2) + [1] * (len(p.second) + 1) for p in pairs]
        longest = max(map(len, rows))

        def padded(lists: list[list[int]], value: int) -> Tensor:
            return torch.tensor([one + [value] * (longest - len(one)) for one in lists])

        input_ids, labels = self.masked(padded(rows, self.pad), generator)
        return {
            "input_ids": input_ids,
            "attention_mask": padded([[1] * len(row) for row in rows], 0),
            "token_type_ids": padded(types, 0),
            "labels": labels,
            "next_sentence_label": torch.tensor([int(not p.follows) for p in pairs]),
        }

    def masked(self, input_ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids ``(batch, seqlen)`` with some replaced, and the labels: what was chosen, elsewhere -100."""
        special = torch.tensor(self.special)
        ordinary = ~torch.isin(input_ids, special)
        count = (ordinary.sum(1, keepdim=True) * self.rate).round().clamp(min=1)
        order = torch.rand(input_ids.shape, generator=generator).masked_fill(~ordinary, 2.0)
        chosen = (order.argsort(1).argsort(1) < count) & ordinary

        fate = torch.rand(input_ids.shape, generator=generator)
        allowed = torch.ones(self.vocabulary, dtype=torch.bool)
        allowed[special] = False
        allowed = allowed.nonzero().squeeze(1)
        drawn = allowed[torch.randint(len(allowed), input_ids.shape, generator=generator)]
        replaced = torch.where(fate < 0.8, self.mask, torch.where(fate < 0.9, drawn, input_ids))
        return torch.where(chosen, replaced, input_ids), torch.where(chosen, input_ids, IGNORED)
