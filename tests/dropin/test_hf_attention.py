"""``attn_implementation="pytorch_ext"`` alone, in models that were not optimised, and what transformers hands to it."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pytorch_ext.testing import cumulative, padding_mask

MODELS = [
    "hf.BertModel",
    "hf.RobertaModel",
    "hf.DistilBertModel",
    "hf.ModernBertModel",
    "hf.GPT2Model",
    "hf.ViTModel",
]
LENGTHS = [4, 1, 6]


@pytest.fixture(scope="session")
def attention(transformers):
    import pytorch_ext.huggingface

    return transformers.AttentionInterface()[pytorch_ext.huggingface.NAME]


@pytest.fixture(scope="session")
def states():
    """Query, key and value ``(batch, heads, length, head_dim)``."""

    def make(batch=1, heads=4, length=11, dim=8, key_heads=None):
        generator = torch.Generator().manual_seed(0)
        shapes = [(batch, n, length, dim) for n in (heads, key_heads or heads, key_heads or heads)]
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    return make


class Attention(nn.Module):
    is_causal = False


class CausalAttention(nn.Module):
    is_causal = True


def softmax_attention(query, key, value, mask=None, softcap=None, bias=None):
    """As (batch, length, heads, head_dim), in so many words."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def sequences(lengths=LENGTHS):
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return numbers[:, None] == numbers


def flash_kwargs(lengths=LENGTHS):
    at = cumulative(lengths)
    return {
        "cu_seq_lens_q": at,
        "cu_seq_lens_k": at,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@pytest.mark.parametrize("kind", ["right", "left", "none", "4-D bool"])
@pytest.mark.parametrize("name", MODELS)
def test_models_with_our_attention_alone(make_model, make_batch, assert_same, name, kind):
    import pytorch_ext.huggingface

    original, ours = make_model(name), make_model(name)
    ours.set_attn_implementation(pytorch_ext.huggingface.NAME)
    assert {type(m) for m in ours.modules()} == {type(m) for m in original.modules()}
    batch = make_batch(kind, types=False)
    if "ViT" in name:
        batch.inputs = {
            "pixel_values": torch.rand(3, 3, 8, 8, generator=batch.generator, dtype=torch.float64)
        }
        batch.real = torch.ones(3, 5, dtype=torch.bool)
    loose = {"rtol": 1e-4, "atol": 1e-5} if "ModernBert" in name else {}
    assert_same(original, ours, batch, backward=True, **loose)


@pytest.mark.full
def test_one_import_registers_it_and_importing_the_package_does_not(transformers):
    script = """
import sys, pytorch_ext
assert "transformers" not in sys.modules
import pytorch_ext.huggingface
from transformers import AttentionInterface, AttentionMaskInterface
assert "pytorch_ext" in AttentionInterface() and "pytorch_ext" in AttentionMaskInterface()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("module", [Attention(), CausalAttention()], ids=["bidirectional", "causal"])
def test_sequences_laid_end_to_end(attention, states, module, key_heads):
    query, key, value = states(key_heads=key_heads)
    got, weights = attention(module, query, key, value, None, **flash_kwargs())
    mask = sequences()
    if module.is_causal:
        mask = mask & torch.ones(11, 11, dtype=torch.bool).tril()
    torch.testing.assert_close(got, softmax_attention(query, key, value, mask)[0])
    assert weights is None


def test_sequences_of_keys_of_their_own(attention, states):
    """As cross attention over a flattened batch has them."""
    query, _, _ = states()
    _, key, value = states(length=7)
    at = cumulative([3, 3, 1])
    lengths = flash_kwargs() | {"cu_seq_lens_k": at, "max_length_k": 3}
    got, _ = attention(Attention(), query, key, value, None, **lengths)
    mask = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[
        :, None
    ] == torch.repeat_interleave(torch.arange(3), torch.tensor([3, 3, 1]))
    torch.testing.assert_close(got, softmax_attention(query, key, value, mask)[0])


@pytest.mark.parametrize(
    "asked", [{}, {"output_attentions": True}, {"softcap": 2.0}], ids=["", "weights", "softcap"]
)
@pytest.mark.parametrize("window", [None, 3])
def test_lengths_beside_a_mask_or_a_window(attention, states, window, asked):
    """Sequences never mix, whatever else is said."""
    query, key, value = states()
    band = (torch.arange(11)[:, None] - torch.arange(11)).abs() < (window or 11)
    everything = {"sliding_window": window, **flash_kwargs(), **asked}
    expected, weights = softmax_attention(query, key, value, sequences() & band, asked.get("softcap"))
    for mask in (None, band[None, None]):
        got, found = attention(Attention(), query, key, value, mask, **everything)
        torch.testing.assert_close(got, expected)
        if "output_attentions" in asked:
            torch.testing.assert_close(found, weights)


@pytest.mark.parametrize("module", [Attention(), CausalAttention()], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("window", [None, 3, 20])
def test_padding_windows_and_order(attention, states, module, window):
    """Of a 2-D mask, which says nothing of the two."""
    query, key, value = states(3)
    real = padding_mask([11, 4, 7], 11)
    mask = real[:, None, None, :]
    if window is not None:
        mask = mask & ((torch.arange(11)[:, None] - torch.arange(11)).abs() < window)
    if module.is_causal:
        mask = mask & torch.ones(11, 11, dtype=torch.bool).tril()
    got, _ = attention(module, query, key, value, real, sliding_window=window)
    torch.testing.assert_close(got[real], softmax_attention(query, key, value, mask)[0][real])


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_a_bias_of_positions(attention, states, mask):
    query, key, value = states(2)
    bias = torch.randn(1, 4, 11, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    real = padding_mask([11, 6], 11)[:, None, None, :]
    given = {"none": None, "bool": real, "added": torch.zeros(real.shape, dtype=torch.float64)}[mask]
    if mask == "added":
        given = given.masked_fill(~real, torch.finfo(torch.float64).min)
    got, _ = attention(Attention(), query, key, value, given, position_bias=bias)
    expected = softmax_attention(query, key, value, None if mask == "none" else real, bias=bias)[0]
    torch.testing.assert_close(got, expected)


def test_a_bias_of_positions_in_causal_attention(attention, states):
    query, key, value = states(2)
    bias = torch.randn(1, 4, 11, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, _ = attention(CausalAttention(), query, key, value, None, position_bias=bias)
    before = torch.ones(11, 11, dtype=torch.bool).tril()
    torch.testing.assert_close(got, softmax_attention(query, key, value, before, bias=bias)[0])


def test_one_query_attends_all_that_a_cache_holds(attention, states):
    _, key, value = states(2)
    query = torch.ones(2, 4, 1, 8, dtype=torch.float64)
    got, _ = attention(CausalAttention(), query, key, value, None)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value).transpose(1, 2))


def test_what_it_refuses(attention, states):
    with pytest.raises(ValueError, match="s_aux: expected None with attn_implementation='pytorch_ext'"):
        attention(Attention(), *states(), None, s_aux=torch.zeros(4))


def test_a_collator_that_flattens(transformers, make_model):
    """The batch as transformers makes it; each text comes out as alone."""
    import pytorch_ext.huggingface

    model = make_model("hf.BertModel")
    model.set_attn_implementation(pytorch_ext.huggingface.NAME)
    generator = torch.Generator().manual_seed(0)
    texts = [{"input_ids": torch.randint(1, 61, (n,), generator=generator).tolist()} for n in LENGTHS]
    collator = transformers.DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_position_ids=True
    )
    batch = collator(texts)
    batch.pop("labels")
    with torch.no_grad():
        got = model(**batch).last_hidden_state[0].split(LENGTHS)
        for text, hidden in zip(texts, got, strict=True):
            expected = model(torch.tensor([text["input_ids"]])).last_hidden_state[0]
            torch.testing.assert_close(hidden, expected, rtol=1e-9, atol=1e-11)
