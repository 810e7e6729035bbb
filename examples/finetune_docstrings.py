"""Fine-tune the packaged MiniLM to tell which part of the standard library a docstring comes from.

    python examples/finetune_docstrings.py           # the original and the optimised model, a step of each in turn
    python examples/finetune_docstrings.py --tune    # what learns: all, the last two layers, or what auto chooses

The first compares losses, accuracy and speed of the same steps: same batches, same seed, no dropout, fp32, each batch
padded to its longest text. It writes a picture of the losses. The second runs `pytorch-ext finetune` three times.
"""

import argparse
import copy
import csv
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from side_by_side import Run, draw, steps, take_turns

import pytorch_ext
from pytorch_ext import finetune
from pytorch_ext.demo import model as models
from pytorch_ext.demo import texts
from pytorch_ext.finetune.data import Parts, Rows, split

CLASSES = 12


def docstrings() -> Rows:
    """Docstrings of the parts of the standard library that have most of them, and which part each is from."""
    found = [(text.text, text.name.partition(".")[0]) for text in texts.collect(None)]
    most = {part for part, _ in Counter(part for _, part in found).most_common(CLASSES)}
    kept = [row for row in found if row[1] in most]
    return Rows([text for text, _ in kept], [part for _, part in kept])


def make_batches(
    encoded: list[dict], labels: list[int], size: int, collate, seed: int | None
) -> Iterator[dict]:
    """Without a seed every text once, in order; with one on and on, in a new order each time."""
    numbers = list(range(len(labels)))
    draw = random.Random(seed)
    while True:
        if seed is not None:
            draw.shuffle(numbers)
        for start in range(0, len(numbers), size):
            yield collate([{**encoded[n], "labels": labels[n]} for n in numbers[start : start + size]])
        if seed is None:
            return


def compare(parts: Parts, folder: Path, options: argparse.Namespace) -> None:
    """Trains the original and the optimised model, and prints how they did."""
    import transformers

    tokenizer = models.load_tokenizer(folder)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    encoded = {}
    for name, rows in (("train", parts.train), ("test", parts.test)):
        found = tokenizer(rows.texts, truncation=True, max_length=options.max_length)
        encoded[name] = [{key: found[key][n] for key in found} for n in range(len(rows))]

    torch.manual_seed(options.seed)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    original = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(parts.classes), dtype=torch.float32, **dropout
    )
    fast = pytorch_ext.optimize(copy.deepcopy(original))
    runs = [Run(model, options.steps, options.rate) for model in (original, fast)]

    held_out = parts.numbers(parts.test)
    batches = list(make_batches(encoded["test"], held_out, 32, collate, None))

    @torch.no_grad()
    def accuracy(run: Run) -> str:
        run.model.eval()
        found = torch.cat([run.model(**batch).logits.argmax(-1) for batch in batches])
        right = (found == torch.tensor(held_out)).sum().item()
        return f"  held out {right / len(held_out):.1%} ({right} of {len(held_out)})"

    stream = make_batches(encoded["train"], parts.numbers(parts.train), options.batch, collate, options.seed)
    take_turns(*runs, stream, options.steps, accuracy)
    draw(*runs, "Fine-tuning MiniLM on docstrings, the same batches", options.picture)


def compare_tunes(rows: Rows, options: argparse.Namespace) -> None:
    """Held-out accuracy and time by what learns."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "docstrings.csv"
        with data.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *zip(rows.texts, rows.labels, strict=True)])
        for how in ("full", "last:2", "auto"):
            start = time.perf_counter()
            found = finetune.run(
                finetune.Options(
                    data,
                    tune=how,
                    max_steps=options.steps,
                    eval_steps=options.steps,
                    tokens_per_batch=max(options.tokens, 2 * options.max_length),
                    max_length=options.max_length,
                    learning_rate=options.rate,
                    seed=options.seed,
                    out=Path(folder) / how.replace(":", "-"),
                ),
                say=lambda line: None,
            )
            tuned, held_out = found["tuned"], found["held out"]
            print(
                f"  {how:7} held out {held_out['accuracy']:.1%} of {held_out['rows']}, F1 {held_out['f1']:.3f}"
                f"  {found['tokens per second']:,.0f} tokens/s  {time.perf_counter() - start:.0f} s in all"
                f"  {tuned['weights'] / 1e6:.1f} of {tuned['of'] / 1e6:.1f} M weights learn: "
                + ", ".join(tuned.get("learn", ["all"])),
                flush=True,
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="compare what learns, instead of the two models")
    parser.add_argument("--steps", type=steps, default=200)
    parser.add_argument(
        "--batch", type=int, default=8, help="texts in a batch of the comparison of two models"
    )
    parser.add_argument("--tokens", type=int, default=512, help="real tokens in a batch of --tune")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("finetune-docstrings.png"))
    options = parser.parse_args(arguments)

    rows = docstrings()
    print(f"MiniLM on {len(rows):,} docstrings of {CLASSES} parts of the standard library, fp32 on the CPU")
    if options.tune:
        compare_tunes(rows, options)
    else:
        compare(split(rows, None, None, options.seed), models.find(None).folder, options)


if __name__ == "__main__":
    main()
