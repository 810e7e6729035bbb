"""Small models of every family, batches to run them on, and what it means that two models do the same."""

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pytorch_ext
from pytorch_ext import ops
from pytorch_ext.nn import _whole
from pytorch_ext.testing import LARGEST_FACTOR, Error, padding_mask

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "type_vocab_size": 3,
}
# What a family names otherwise, has besides, or drops out by default; by its ``model_type``.
FAMILIES = {
    "electra": {"embedding_size": 16, "summary_last_dropout": 0.0},
    "albert": {"embedding_size": 16, "inner_group_num": 2, "classifier_dropout_prob": 0.0},
    "distilbert": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "qa_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
    "modernbert": {
        # Windows of two tokens to each side in the second layer.
        "local_attention": 4,
        "global_attn_every_n_layers": 2,
        "num_hidden_layers": 3,
        "pad_token_id": 0,
        "cls_token_id": 1,
        "bos_token_id": 1,
        "sep_token_id": 2,
        "eos_token_id": 2,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 24,
        "use_cache": False,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "summary_first_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "vit": {"image_size": 8, "patch_size": 4, "encoder_stride": 4},
}
OWN_NAMES = ("distilbert", "gpt2")
SEQLEN = 11
LENGTHS = [11, 5, 1, 8]
PACKAGES = {"hf": "transformers", "px": "pytorch_ext.models"}


@pytest.fixture(autouse=True)
def one_thread():
    """The models are too small to share out: on a busy machine waiting for a second thread takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason="compares with Hugging Face transformers")


@pytest.fixture(scope="session")
def make_model(transformers):
    """``"hf.BertModel"`` is Hugging Face's, ``"px.BertModel"`` ours: random weights, float64, no dropout, eval mode."""

    def make(name="hf.BertModel", *, dtype=torch.float64, attention="sdpa", dropout=0.0, init=None, **fields):
        family, _, cls = name.partition(".")
        package = importlib.import_module(PACKAGES[family])
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config_class = getattr(getattr(package, cls), "config_class", package.BertConfig)
        kind = config_class.model_type if family == "hf" else "bert"
        usual = {"vocab_size": SIZES["vocab_size"]} if kind in OWN_NAMES else {**SIZES, **rates}
        config = config_class(**{**usual, **FAMILIES.get(kind, {}), **fields})
        if family == "hf":
            config._attn_implementation = attention
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(package, cls)(config, **(init or {})).to(dtype).eval()
        # Biases and LayerNorms too: with the zeros and ones that they start from, a wrong one would not show.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.2 * noise.to(dtype))
        return model

    return make


@pytest.fixture(scope="session")
def make_pair(make_model):
    """A model as it is, and a copy of it that was optimised."""

    def make(name="hf.BertModel", *, backend=None, remove_padding="auto", **kwargs):
        original = make_model(name, **kwargs)
        fast = pytorch_ext.optimize(copy.deepcopy(original), backend=backend, remove_padding=remove_padding)
        return original, fast

    return make


@pytest.fixture(scope="session")
def make_batch():
    """Inputs, and at which positions the results count: bool ``(batch, seqlen)``."""

    def make(kind="right", *, dtype=torch.int64, types=True):
        generator = torch.Generator().manual_seed(1)
        lengths = {"all padding": [11, 0, 5, 3], "one token": [1] * 4, "full": [SEQLEN] * 4}.get(
            kind, LENGTHS
        )
        real = padding_mask(lengths, SEQLEN)
        if kind == "left":
            real = real.flip(1)
        if kind == "holes":
            real = real & (torch.arange(SEQLEN) % 3 != 1)
        mask = real.to(dtype)
        if kind.startswith("4-D"):
            mask = torch.rand(len(lengths), 1, SEQLEN, SEQLEN, generator=generator) < 0.6
            mask[..., 0] = True  # a query that may attend nothing gives NaN in eager attention
            mask &= real[:, None, None, :]
            if kind == "4-D additive":
                mask = torch.where(mask, torch.randn(mask.shape, generator=generator), -torch.inf).to(dtype)
        inputs = {"input_ids": torch.randint(1, SIZES["vocab_size"], real.shape, generator=generator)}
        if types:
            inputs["token_type_ids"] = torch.randint(0, 3, real.shape, generator=generator)
        if kind != "none":
            inputs["attention_mask"] = mask
        else:
            real = torch.ones_like(real)
        return SimpleNamespace(inputs=inputs, real=real, generator=generator)

    return make


@pytest.fixture(scope="session")
def values():
    """The tensors of a model's output by name, where they count: at real positions, of sequences that have some."""
    return _values


@pytest.fixture(scope="session")
def run(values):
    """One forward: its values, and with ``backward`` the gradients of all parameters."""

    def run(model, inputs, real, *, backward=False):
        model.zero_grad()
        with torch.set_grad_enabled(backward):
            found = values(model(**inputs), real)
        if backward:
            loss = found.get("loss")
            if loss is None:
                loss = sum((t * _weights(t)).sum() for t in found.values() if t is not None)
            loss.backward()
        return found, {name: p.grad for name, p in model.named_parameters()} if backward else {}

    return run


@pytest.fixture(scope="session")
def assert_same(run):
    """That two models give the same on ``batch``, to rounding: outputs, and with ``backward`` every gradient."""

    def check(original, fast, batch, *, backward=False, rtol=1e-9, atol=1e-11):
        expected = run(original, batch.inputs, batch.real, backward=backward)
        got = run(fast, batch.inputs, batch.real, backward=backward)
        for those, these in zip(expected, got, strict=True):
            assert those.keys() == these.keys()
            for name, value in those.items():
                if value is None:
                    assert these[name] is None, name
                    continue
                torch.testing.assert_close(
                    these[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
                )

    return check


@pytest.fixture(scope="session")
def assert_rounds_alike():
    """In a low precision: at most twice the original error against the exact result, and one rounding more."""

    def check(got, expected, exact):
        ours, original = Error(), Error()
        ours.add(got, exact)
        original.add(expected, exact)
        assert ours.largest <= LARGEST_FACTOR * original.largest + torch.finfo(got.dtype).eps * ours.scale
        assert ours.unequal <= original.unequal

    return check


@pytest.fixture
def calls(monkeypatch):
    """How often the two attentions are called by fused layers, or all of a layer: ``calls.packed``, ``calls.dense``."""
    seen = SimpleNamespace(packed=0, dense=0, shapes=[])

    def spy(owner, name, count):
        function = getattr(owner, name)

        def counted(query, *args, **kwargs):
            out = function(query, *args, **kwargs)
            if out is not None:
                setattr(seen, count, getattr(seen, count) + 1)
                seen.shapes.append(tuple(query.shape))
            return out

        monkeypatch.setattr(owner, name, counted)

    spy(ops, "varlen_attention", "packed")
    spy(ops, "scaled_dot_product_attention", "dense")
    spy(_whole, "encoder_layer", "packed")
    spy(_whole, "encoder_layer_direct", "packed")
    return seen


@pytest.fixture
def fused_layers(calls):
    """``fused_layers(model, inputs)``: how many layers of a forward without gradient ran fused, without padding."""

    def count(model, inputs):
        before = calls.packed
        with torch.no_grad():
            model(**inputs)
        return calls.packed - before

    return count


def _values(output, real):
    found = {}
    for key in _fields(output):
        value = getattr(output, key)
        if isinstance(value, tuple):
            found |= {f"{key}.{i}": None if t is None else _at(t, real) for i, t in enumerate(value)}
        elif isinstance(value, torch.Tensor):  # the rest are caches of keys and values
            found[key] = _at(value, real)
    return found


def _fields(output):
    return output.keys() if hasattr(output, "keys") else output.__dataclass_fields__


def _at(t, real):
    if t.shape[:2] == real.shape:
        return t[real]
    if t.dim() == 4:  # attention weights (batch, heads, queries, keys)
        return t.transpose(1, 2)[real]
    return t[real.any(1)] if t.shape[:1] == real.shape[:1] else t


def _weights(t):
    return torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t)


class Halved(nn.Module):
    """A parametrization: the module computes with half of what its parameter holds."""

    def forward(self, x):
        return x / 2


@pytest.fixture(scope="session")
def halved():
    return Halved
