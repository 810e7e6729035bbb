"""A BERT of a few thousand weights with a tokenizer of words, and rows that it can learn to tell apart."""

import csv
import gc
import itertools
import random

import pytest
import torch

WORDS = {
    "fruit": ["apple", "pear", "plum", "cherry", "grape", "melon"],
    "metal": ["iron", "copper", "zinc", "silver", "gold", "lead"],
    "river": ["danube", "nile", "rhine", "volga", "loire", "tagus"],
}
COMMON = ["the", "of", "a", "and", "in", "it", "is", "as", "for", "with"]


@pytest.fixture(scope="session")
def transformers():
    for name in ("accelerate", "peft", "matplotlib"):
        pytest.importorskip(name, reason=f"fine-tuning asks for {name}")
    return pytest.importorskip("transformers", reason="fine-tuning is done by its Trainer")


@pytest.fixture(scope="session")
def tiny_bert(transformers, tmp_path_factory):
    """The folder; its model has random weights, and dropout."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COMMON, *itertools.chain(*WORDS.values())]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=64).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_rows():
    """``(text, label)`` pairs: a few words of one kind among others that say nothing."""

    def make(count=90, seed=0):
        draw = random.Random(seed)
        rows = []
        for number in range(count):
            label = list(WORDS)[number % len(WORDS)]
            words = draw.choices(WORDS[label], k=3) + draw.choices(COMMON, k=draw.randint(1, 20))
            draw.shuffle(words)
            rows.append((" ".join(words), label))
        return rows

    return make


@pytest.fixture
def write(tmp_path):
    """Writes a CSV file and returns its path."""

    def write(rows, name="data.csv", columns=("text", "label")):
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)
        return path

    return write


@pytest.fixture
def make_options(tiny_bert, write, make_rows, tmp_path):
    from pytorch_ext.finetune import Options

    def make(**changed):
        data = changed.pop("data", None) or write(make_rows())
        usual = {
            "model": tiny_bert,
            "max_length": 32,
            "tokens_per_batch": 256,
            "max_steps": 12,
            "eval_steps": 4,
        }
        usual |= {"learning_rate": 5e-3, "threads": 1, "precision": "fp32", "device": "cpu"}
        return Options(data=data, **{**usual, "out": tmp_path / "out", **changed})

    return make


@pytest.fixture
def without_page(transformers, monkeypatch):
    """A run draws no page, which takes longer than the few steps."""
    from pytorch_ext.finetune import whole

    monkeypatch.setattr(whole.page, "page", lambda found: "")


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """Trainer collects garbage in every run, and looks at all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
