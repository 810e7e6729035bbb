"""SentenceTransformer, CrossEncoder and SparseEncoder: embeddings, scores, pools of processes, training."""

import copy
import os
import pickle
from types import SimpleNamespace

import pytest
import torch

import pytorch_ext

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEXTS = [
    "a",
    "one sentence, neither long nor short",
    "two words",
    "the longest of them all: it goes on and on, until nobody knows any more how it began; and on",
    "",
    "x y z",
]
PAIRS = [("which?", text) for text in TEXTS]
POOLING = ["mean", "max", "cls", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"]


@pytest.fixture(scope="module")
def st(transformers):
    package = pytest.importorskip("sentence_transformers", reason="compares with sentence-transformers")
    from sentence_transformers.base.modules import transformer

    return SimpleNamespace(package=package, Transformer=transformer.Transformer)


@pytest.fixture(scope="module")
def folder(st, transformers, tmp_path_factory):
    """A BERT of a few thousand weights that drops nothing, with a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;()?_-"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=64).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make_embedder(st, folder):
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    def make(pooling="mean", *, include_prompt=True, side="right"):
        words = st.Transformer(str(folder))
        words.tokenizer.padding_side = side
        pool = Pooling(32, pooling_mode=pooling, include_prompt=include_prompt)
        return st.package.SentenceTransformer(modules=[words, pool, Normalize()], device="cpu").double()

    return make


def embed(model, texts=TEXTS, **kwargs):
    return model.encode(texts, convert_to_tensor=True, show_progress_bar=False, **kwargs)


def padding(model):
    return [line for line in pytorch_ext.explain(model).padding if "last forward" in line]


@pytest.mark.parametrize("flattened", [False, True], ids=["padded", "flattened"])
@pytest.mark.parametrize("pooling", POOLING)
def test_embeddings_by_every_pooling(make_embedder, pooling, flattened):
    model = make_embedder(pooling)
    expected = embed(model)
    pytorch_ext.optimize(model)
    model[0].unpad_inputs = flattened
    assert model[0].can_flatten_inputs is flattened
    torch.testing.assert_close(embed(model), expected, rtol=1e-9, atol=1e-11)
    assert "without padding" in padding(model)[0]


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
# The sizes by the names of their configs, and whether a flattened batch can be taken: MPNet hands no lengths down.
FAMILIES = {
    "Roberta": (SIZES, True),
    "DistilBert": ({"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, True),
    "MPNet": (SIZES, False),
    "ModernBert": ({**SIZES, "global_attn_every_n_layers": 2, "local_attention": 8}, True),
    "GPT2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 72}, True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_positions_of_their_own(transformers, st, folder, tmp_path, family):
    from sentence_transformers.sentence_transformer.modules import Pooling

    sizes, flattens = FAMILIES[family]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    special = {f"{name}_token_id": 2 for name in ("bos", "cls", "eos", "sep")}
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 72, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**{**common, **special, **sizes})
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    words = st.Transformer(str(tmp_path))
    # As the families' own tokenizers: their collator leaves token types out, to which GPT-2 gives embeddings.
    words.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model = st.package.SentenceTransformer(modules=[words, Pooling(32)], device="cpu").double()
    expected = embed(model)
    pytorch_ext.optimize(model)
    for flattened in (False, True):
        model[0].unpad_inputs = flattened
        assert model[0].can_flatten_inputs is (flattened and flattens)
        torch.testing.assert_close(embed(model), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("flattened", [False, True], ids=["padded", "flattened"])
def test_prompts_that_are_not_pooled(make_embedder, flattened):
    model = make_embedder(include_prompt=False)
    expected = embed(model, prompt="find this: ")
    assert not torch.allclose(expected, embed(model))
    pytorch_ext.optimize(model)
    model[0].unpad_inputs = flattened
    torch.testing.assert_close(embed(model, prompt="find this: "), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_tokenizers_that_pad_on_the_left(make_embedder, pooling):
    model = make_embedder(pooling, side="left")
    expected = embed(model)
    torch.testing.assert_close(embed(pytorch_ext.optimize(model)), expected, rtol=1e-9, atol=1e-11)
    assert "position 0 of sequence" in padding(model)[0]
    pytorch_ext.optimize(model, remove_padding=True)
    torch.testing.assert_close(embed(model), expected, rtol=1e-9, atol=1e-11)
    assert "without padding" in padding(model)[0]


def test_token_embeddings_and_everything_else(make_embedder):
    """They read the attention mask, which a flattened batch has not; so nothing is flattened unasked."""
    model = make_embedder()
    tokens, everything = embed(model, output_value="token_embeddings"), embed(model, output_value=None)
    pytorch_ext.optimize(model)
    assert not model[0].can_flatten_inputs
    torch.testing.assert_close(embed(model, output_value="token_embeddings"), tokens, rtol=1e-9, atol=1e-11)
    for got, expected in zip(embed(model, output_value=None), everything, strict=True):
        assert got.keys() == expected.keys()
        real = expected["attention_mask"].bool()
        for key in ("sentence_embedding", "token_embeddings"):
            rows = real if key == "token_embeddings" else ...
            torch.testing.assert_close(got[key][rows], expected[key][rows], rtol=1e-9, atol=1e-11)


def test_pretrained_weights(st):
    """In float32: against the exact result no further off than the original."""
    demo = pytest.importorskip("pytorch_ext.demo.model")
    try:
        folder = demo.find(None).folder
    except demo.DemoError as error:
        pytest.skip(f"compares the embeddings of a real model: {error}")
    model = st.package.SentenceTransformer(str(folder), device="cpu")
    texts = [text * 3 for text in TEXTS] + [line for line in __doc__.split() if line.strip()]
    exact = embed(copy.deepcopy(model).double(), texts)
    original = embed(model, texts)
    scale = (original - exact).abs().max()
    pytorch_ext.optimize(model)
    for flattened in (False, True):
        model[0].unpad_inputs = flattened
        got = embed(model, texts)
        assert (got - exact).abs().max() <= 2 * scale + torch.finfo(torch.float32).eps
        assert "without padding" in padding(model)[0]
    pytorch_ext.revert(model)
    torch.testing.assert_close(embed(model, texts), original, rtol=0, atol=0)


def test_unpad_inputs_asked_for_at_any_time(make_embedder, caplog):
    model = make_embedder()
    model[0].unpad_inputs = True
    assert "prerequisites" in caplog.text
    before = sorted(vars(model[0]))
    expected = embed(model)
    pytorch_ext.optimize(model)
    assert model[0].can_flatten_inputs
    assert "cu_seq_lens_q" in model[0].preprocess(TEXTS)
    torch.testing.assert_close(embed(model), expected, rtol=1e-9, atol=1e-11)
    caplog.clear()
    model[0].unpad_inputs = None
    assert not model[0].can_flatten_inputs
    model[0].unpad_inputs = True
    assert not caplog.text

    # Any other attention would let texts attend each other.
    model[0].model.set_attn_implementation("eager")
    assert not model[0].can_flatten_inputs
    torch.testing.assert_close(embed(model), expected, rtol=1e-9, atol=1e-11)
    pytorch_ext.optimize(model)
    assert model[0].can_flatten_inputs
    pytorch_ext.revert(model)
    assert not model[0].can_flatten_inputs
    assert sorted(vars(model[0])) == before
    torch.testing.assert_close(embed(model), expected, rtol=1e-9, atol=1e-11)


def test_copies_and_files(make_embedder, st, tmp_path):
    model = make_embedder()
    expected = embed(model)
    pytorch_ext.optimize(model)
    model[0].unpad_inputs = True
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(embed(other), expected, rtol=1e-9, atol=1e-11)
        assert type(other[0]) is type(model[0])
        assert type(pytorch_ext.revert(other)[0]) is st.Transformer
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = st.package.SentenceTransformer(str(tmp_path / "saved"), device="cpu").double()
    assert type(loaded[0]) is st.Transformer
    assert type(loaded[0].model).__name__ == type(model[0].model).__name__
    torch.testing.assert_close(embed(loaded), expected, rtol=1e-6, atol=1e-7)


def test_what_explain_says(make_embedder):
    report = pytorch_ext.explain(pytorch_ext.optimize(make_embedder()))
    found = {row.where: (row.was, row.now, row.inside) for row in report.replaced}
    assert found["*"] == ("Transformer", "FlatteningTransformer", False)
    assert found["*.model.encoder"] == ("BertEncoder", "PaddingFreeBertEncoder", False)
    assert report.padding == ["0.model.encoder: removed where a 2-D mask shows some and position 0 is real"]


@pytest.mark.parametrize("labels", [1, 3])
def test_cross_encoders(st, folder, labels):
    torch.manual_seed(0)
    model = st.package.CrossEncoder(str(folder), num_labels=labels, device="cpu").double()
    expected = model.predict(PAIRS, convert_to_tensor=True)
    ranks = model.rank("which?", TEXTS) if labels == 1 else None
    pytorch_ext.optimize(model)
    torch.testing.assert_close(model.predict(PAIRS, convert_to_tensor=True), expected, rtol=1e-9, atol=1e-11)
    assert "without padding" in padding(model)[0]
    if ranks:
        assert [r["corpus_id"] for r in model.rank("which?", TEXTS)] == [r["corpus_id"] for r in ranks]
    # A head reads position 0 of each row, so pairs are never laid end to end.
    model[0].unpad_inputs = True
    assert not model[0].can_flatten_inputs
    torch.testing.assert_close(model.predict(PAIRS, convert_to_tensor=True), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("flattened", [False, True], ids=["padded", "flattened"])
def test_sparse_encoders(st, folder, flattened):
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    words = st.Transformer(str(folder), transformer_task="fill-mask")
    model = st.package.SparseEncoder(modules=[words, SpladePooling("max")], device="cpu").double()

    def encode():
        return model.encode(TEXTS, convert_to_sparse_tensor=False, show_progress_bar=False)

    expected = encode()
    assert expected.count_nonzero()
    pytorch_ext.optimize(model)
    model[0].unpad_inputs = flattened
    assert model[0].can_flatten_inputs is flattened
    torch.testing.assert_close(encode(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.full
def test_a_pool_of_processes(make_embedder):
    """Workers get the optimised model through a pickle."""
    model = make_embedder()
    expected = embed(model, TEXTS * 4)
    pytorch_ext.optimize(model)
    model[0].unpad_inputs = True
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        got = model.encode(TEXTS * 4, pool=pool, chunk_size=6)
    finally:
        model.stop_multi_process_pool(pool)
    torch.testing.assert_close(torch.from_numpy(got), expected.cpu(), rtol=1e-9, atol=1e-11)


def trained(st, model, folder, steps=3):
    """After some steps of their trainer; what it evaluates between steps is part of what it does."""
    datasets = pytest.importorskip("datasets", reason="the trainer of sentence-transformers asks for it")
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.trainer import SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.training_args import (
        SentenceTransformerTrainingArguments,
    )

    pairs = [t for t in TEXTS if t] * 4
    data = datasets.Dataset.from_dict({"anchor": pairs, "positive": [t[::-1] for t in pairs]})
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        adam_epsilon=1e-3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, loss=loss
    )
    trainer.train()
    assert arguments.optim == "adamw_torch_fused"
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def test_their_trainer(st, make_embedder, tmp_path):
    original, fast = make_embedder(), pytorch_ext.optimize(make_embedder())
    fast[0].unpad_inputs = True
    before = embed(fast)  # from weights laid out before the first step
    losses = [trained(st, model, tmp_path) for model in (original, fast)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 3
    got, expected = embed(fast), embed(original)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
