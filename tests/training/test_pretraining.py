"""Sentence pairs and masked tokens, and a model that learns from them."""

import copy

import pytest
import torch
import torch.nn.functional as F

import pytorch_ext
from pytorch_ext.models import BertConfig, BertForPreTraining
from pytorch_ext.training.pretraining import IGNORED, Masking, Pair, pair_up, train_wordpiece

MASKING = Masking(vocabulary=50, pad=0, cls=2, sep=3, mask=4, special=(0, 1, 2, 3, 4))


@pytest.fixture
def documents():
    """Ten of twenty sentences; every token has a number of its own, from which its place can be told."""
    return [
        [[100_000 * d + 100 * s + t for t in range(1 + (7 * d + 3 * s) % 9)] for s in range(20)]
        for d in range(10)
    ]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    sentences = [torch.randint(5, 50, (n,), generator=generator).tolist() for n in (5, 11, 2, 7, 1, 9, 4, 3)]
    pairs = [
        Pair(a, b, follows)
        for a, b, follows in zip(sentences[::2], sentences[1::2], (1, 0, 1, 0), strict=True)
    ]
    return MASKING.batch(pairs, generator)


def test_pairs_are_neighbours_or_of_two_documents(documents):
    pairs = pair_up(documents, 24, seed=0)
    for pair in pairs:
        assert pair.first and pair.second and len(pair.first) + len(pair.second) <= 24 - 3
        d = [piece[0] // 100_000 for piece in (pair.first, pair.second)]
        assert (d[0] == d[1]) == pair.follows
        if pair.follows:
            sentences = [piece[at] // 100 % 1000 for piece, at in ((pair.first, -1), (pair.second, 0))]
            assert sentences[0] < sentences[1]
    assert 0.35 < sum(pair.follows for pair in pairs) / len(pairs) < 0.65
    assert pair_up(documents, 24, seed=0) == pairs != pair_up(documents, 24, seed=1)


def test_no_sentence_is_left_out():
    documents = [[[100 * d + s] for s in range(30)] for d in range(5)]
    pairs = pair_up(documents, 13, seed=0)
    used = [token for p in pairs for token in (*p.first, *(p.second if p.follows else ()))]
    assert sorted(used) == [100 * d + s for d in range(5) for s in range(30)]


@pytest.mark.parametrize(
    ("documents", "length", "message"),
    [
        ([[[1]], [[2]]], 4, "length: expected at least 5, got 4"),
        ([[[1]], [[]], []], 9, "documents: expected at least two that are not empty, got 1"),
    ],
)
def test_pairs_that_cannot_be_made(documents, length, message):
    with pytest.raises(ValueError, match=message):
        pair_up(documents, length, 0)


def test_a_batch_is_what_bert_takes(batch):
    assert {
        name: tuple(x.shape) for name, x in batch.items() if name != "next_sentence_label"
    } == dict.fromkeys(("input_ids", "attention_mask", "token_type_ids", "labels"), (4, 19))
    assert batch["next_sentence_label"].tolist() == [0, 1, 0, 1]
    row = torch.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"])[2].tolist()
    assert row[0] == 2 and row[2] == 3 and row[12] == 3 and row[13:] == [0] * 6
    assert batch["token_type_ids"][2].tolist() == [0] * 3 + [1] * 10 + [0] * 6
    assert batch["attention_mask"][2].tolist() == [1] * 13 + [0] * 6


def test_masking_rates_and_what_is_never_masked():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (2000, 40), generator=generator)
    lengths = torch.randint(2, 41, (2000, 1), generator=generator)
    ids[:, 0], ids[:, 2] = MASKING.cls, 1
    ids = torch.where(torch.arange(40) < lengths, ids, MASKING.pad)
    ids.scatter_(1, lengths - 1, MASKING.sep)
    before = ids.clone()
    masked, labels = MASKING.masked(ids, generator)
    assert torch.equal(ids, before)
    chosen = labels != IGNORED
    ordinary = ids >= 5
    assert torch.equal(labels[chosen], ids[chosen]) and not (chosen & ~ordinary).any()
    assert torch.equal(masked[~chosen], ids[~chosen])
    expected = (0.15 * ordinary.sum(1)).round().clamp(min=1).minimum(ordinary.sum(1))
    assert torch.equal(chosen.sum(1), expected.long())
    # No place is likelier than another, within five standard errors.
    share = (chosen.sum(0) / ordinary.sum(0).clamp(min=1))[3:20]
    assert (share - share.mean()).abs().max() < 5 * (0.15 * 0.85 / ordinary.sum(0)[19]) ** 0.5

    now, was, count = masked[chosen], ids[chosen], chosen.sum().item()
    hidden, drawn = now == MASKING.mask, (now != MASKING.mask) & (now != was)
    error = 4 * (0.8 * 0.2 / count) ** 0.5
    assert hidden.float().mean().item() == pytest.approx(0.8, abs=error)
    assert drawn.float().mean().item() == pytest.approx(0.1 * 44 / 45, abs=error)
    assert now[drawn].min() >= 5 and len(now[drawn].unique()) == 45


def test_the_loss_is_that_of_the_whole_projection(batch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=50, max_position_embeddings=20, hidden_dropout_prob=0.0, **sizes)
    config.attention_probs_dropout_prob = 0.0
    original = BertForPreTraining(config).double().train()
    fast = pytorch_ext.optimize(copy.deepcopy(original))
    rows = []
    fast.cls.predictions.decoder.register_forward_hook(lambda m, args, out: rows.append(out.shape))
    fast(**batch).loss.backward()
    assert rows == [((batch["labels"] != IGNORED).sum(), 50)]

    labels, follows = batch.pop("labels"), batch.pop("next_sentence_label")
    whole = original(**batch)
    loss = F.cross_entropy(whole.prediction_logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    (loss + F.cross_entropy(whole.seq_relationship_logits, follows)).backward()
    for (name, parameter), other in zip(original.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_a_vocabulary_of_texts_to_a_batch():
    pytest.importorskip("tokenizers", reason="it makes the vocabulary")
    texts = ["Return the reversed list.", "Returns a list; the list is sorted.", "Sorting lists"]
    tokenizer = train_wordpiece(texts, 60)
    masking = Masking.of(tokenizer)
    assert masking == Masking(tokenizer.get_vocab_size(), 0, 2, 3, 4, (0, 1, 2, 3, 4))
    assert tokenizer.decode(tokenizer.encode("Sorted LIST").ids) == "sorted list"
    ids = [tokenizer.encode(text).ids for text in texts]
    batch = masking.batch(pair_up([ids, ids[::-1]], 32, 0), torch.Generator().manual_seed(0))
    assert batch["input_ids"].max() < masking.vocabulary and batch["attention_mask"].sum(1).max() <= 32
    tokenizer = type(tokenizer)(type(tokenizer.model)({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match=r"tokenizer: expected the tokens .*, got one without \[CLS\]"):
        Masking.of(tokenizer)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rate": 0.0}, "rate: expected a share above 0, at most 1, got 0.0"),
        ({"vocabulary": 5}, "special: expected fewer than all 5 ids, got 5"),
    ],
)
def test_masking_that_makes_no_sense(changed, message):
    with pytest.raises(ValueError, match=message):
        Masking(**{**vars(MASKING), **changed})
