"""Pretrain a small BERT on the standard library's docstrings, with the optimised model beside the original.

    python examples/pretrain_bert.py --steps 200

Masked tokens and next sentences, a WordPiece vocabulary of these very texts. Both models make the same steps in turn:
the same weights at first, the same batches, no dropout, fp32. It prints the losses, tokens/s and memory of each, and
writes a picture of the losses.
"""

import argparse
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from side_by_side import Run, draw, steps, take_turns
from torch import Tensor, nn

import pytorch_ext
from pytorch_ext.benchmarks.timing import peak_memory
from pytorch_ext.demo import texts
from pytorch_ext.models import BertConfig, BertForPreTraining
from pytorch_ext.training import recompute
from pytorch_ext.training.pretraining import Masking, Pair, pair_up, train_wordpiece

SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+|\n\s*\n")


def documents_of_sentences() -> list[list[str]]:
    """The sentences of each docstring that has several."""
    split = (SENTENCE_ENDS.split(text.text) for text in texts.standard_library())
    documents = ([sentence for sentence in one if sentence.strip()] for one in split)
    return [document for document in documents if len(document) > 1]


def make_model(vocabulary: int, length: int, optimised: bool) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForPreTraining(
        BertConfig(vocab_size=vocabulary, max_position_embeddings=length, **sizes, **dropout)
    ).train()
    return pytorch_ext.optimize(model) if optimised else model


def make_batches(
    documents: list[list[list[int]]], masking: Masking, length: int, size: int
) -> Iterator[dict]:
    """On and on: the pairs are made anew in each epoch, and what is masked in each batch."""
    generator = torch.Generator().manual_seed(0)
    for epoch in itertools.count():
        pairs: list[Pair] = pair_up(documents, length, epoch)
        for start in range(0, len(pairs) - size + 1, size):
            yield masking.batch(pairs[start : start + size], generator)


def step_of(batch: dict[str, Tensor], vocabulary: int, length: int, kept: str | None) -> Callable[[], None]:
    """For a fresh process, which measures its memory: forward and backward; ``kept`` None is the original."""
    model = make_model(vocabulary, length, kept is not None)
    if kept == "products":
        recompute(model, "selective")

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(**batch).loss.backward()

    return step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=steps, default=200)
    parser.add_argument("--batch", type=int, default=32, help="pairs in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a pair, at most")
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="write the optimised model and the tokenizer"
    )
    parser.add_argument("--picture", type=Path, default=Path("pretrain-bert.png"))
    options = parser.parse_args(arguments)

    written = documents_of_sentences()
    tokenizer = train_wordpiece(itertools.chain(*written), options.vocabulary)
    masking = Masking.of(tokenizer)
    documents = [[e.ids for e in tokenizer.encode_batch(document)] for document in written]
    tokens = sum(len(sentence) for document in documents for sentence in document)
    print(
        f"{tokens:,} tokens in {len(documents)} docstrings, {masking.vocabulary:,} WordPieces, fp32 on the CPU"
    )

    runs = [
        Run(make_model(masking.vocabulary, options.length, optimised), options.steps, options.rate)
        for optimised in (False, True)
    ]
    batches = make_batches(documents, masking, options.length, options.batch)
    take_turns(*runs, batches, options.steps)
    batch = next(batches)
    print("at the peak of a step, above weights and gradients:")
    for name, kept in (("original", None), ("optimised", "all"), ("recompute(…, 'selective')", "products")):
        used = peak_memory(step_of, batch, masking.vocabulary, options.length, kept)
        print(f"  {name:25}  {'unknown' if used is None else f'{used.bytes / 2**20:.0f} MiB'}", flush=True)
    draw(*runs, "Pretraining a small BERT, the same batches", options.picture)
    if options.save is not None:
        runs[1].model.save_pretrained(options.save)
        tokenizer.save(str(options.save / "tokenizer.json"))
        print(f"written: {options.save}")


if __name__ == "__main__":
    main()
