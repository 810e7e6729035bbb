"""Attention that varlen attention alone cannot do, without padding: MPNet's bias of distances, ModernBERT's windows."""

import pytest
import torch

import pytorch_ext
from pytorch_ext.dropin import _attention, _padding
from pytorch_ext.dropin._attention import attend
from pytorch_ext.dropin._padding import pack_once
from pytorch_ext.dropin._swap import Options
from pytorch_ext.nn._padding import Packed
from pytorch_ext.testing import cumulative, padding_mask

LENGTHS = [19, 1, 0, 7, 12]


@pytest.fixture(params=[4, 256], ids=["many tiles", "one tile"])
def tiles(monkeypatch, request):
    monkeypatch.setattr(_attention, "TILE", request.param)


@pytest.fixture(scope="session")
def batch():
    """Query, key and value of real tokens ``(total, heads, head_dim)``, where they are, and the mask of all pairs."""

    def make(gaps=False, host=True):
        real = padding_mask(LENGTHS, 20)
        if gaps:
            real[:, 2::5] = False
        lengths = real.sum(1).tolist()
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(sum(lengths), 2, 4, generator=generator, dtype=torch.float64) for _ in range(3)
        )
        packed = Packed(
            real,
            real.flatten().nonzero().flatten(),
            cumulative(lengths),
            max(lengths),
            lengths if host else None,
        )
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), packed

    return make


def in_so_many_words(q, k, v, packed, bias, window, scale):
    q, k, v = (packed.pad(t).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT * (4**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    mask = packed.mask[:, None, None, :]
    if window is not None:
        at = torch.arange(20)
        mask = mask & ((at[:, None] - at).abs() <= window)
    weights = scores.masked_fill(~mask, -1e30).softmax(-1)
    return packed.unpad((weights @ v).transpose(1, 2)).flatten(-2)


@pytest.mark.parametrize("host", [True, False], ids=["lengths known", "lengths unknown"])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("window", [None, 0, 3, 11, 40])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.usefixtures("tiles")
def test_outputs_and_gradients(batch, biased, window, scale, gaps, host):
    q, k, v, packed = batch(gaps, host)
    bias = None
    if biased:
        bias = torch.randn(1, 2, 20, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        bias.requires_grad_()
    leaves = [q, k, v] + [bias] * biased
    results = []
    for out in (
        attend(q, k, v, None, packed, bias=bias, window=window, scale=scale),
        in_so_many_words(q, k, v, packed, bias, window, scale),
    ):
        weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, torch.autograd.grad((out * weights).sum(), leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", [0, 3, 11, 40])
@pytest.mark.usefixtures("tiles")
def test_a_padded_batch_without_padding(window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 20, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    at = torch.arange(20)
    near = (at[:, None] - at).abs() <= window
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), near
    ).transpose(1, 2)
    torch.testing.assert_close(attend(q, k, v, None, None, window=window), expected.flatten(-2))


def test_causal_beside_a_window_is_refused(batch):
    q, k, v, packed = batch()
    with pytest.raises(ValueError, match="causal: expected False beside a bias or a window"):
        attend(q, k, v, None, packed, causal=True, window=3)


@pytest.mark.parametrize("layers", [["sliding_attention"] * 2, ["sliding_attention", "full_attention"]])
@pytest.mark.parametrize("kind", ["right", "none", "holes", "left"])
def test_layers_of_modernbert_in_any_order(make_pair, make_batch, assert_same, layers, kind):
    original, fast = make_pair("hf.ModernBertModel", num_hidden_layers=2, layer_types=layers)
    assert_same(original, fast, make_batch(kind, types=False), backward=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{"norm_bias": True}, {"attention_bias": True, "mlp_bias": True}])
def test_biases_of_modernbert(make_pair, make_batch, assert_same, fields):
    original, fast = make_pair("hf.ModernBertModel", **fields)
    assert_same(original, fast, make_batch(types=False), backward=True, rtol=1e-4, atol=1e-5)


def test_masks_by_layer_as_modernbert_takes_them(make_pair, make_batch, assert_same):
    original, fast = make_pair("hf.ModernBertModel")
    batch = make_batch("4-D bool", types=False)
    mask = batch.inputs["attention_mask"]
    batch.inputs["attention_mask"] = {"full_attention": mask, "sliding_attention": mask & mask.mT}
    assert_same(original, fast, batch, backward=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("without_first", [False, True])
@pytest.mark.parametrize(("name", "layers"), [("hf.ModernBertModel", "layers"), ("hf.GPT2Model", "h")])
def test_a_mask_that_was_edited_in_place_counts_anew(
    make_pair, make_batch, assert_same, name, layers, without_first
):
    """The layers of one forward share what was found of a mask, two forwards do not."""
    original, fast = make_pair(name)
    for model in (original, fast):
        if without_first:
            del getattr(model, layers)[0]
    batch = make_batch(dtype=torch.bool, types=False)
    assert_same(original, fast, batch, rtol=1e-6)
    batch.inputs["attention_mask"][:, 3:5] = True
    batch.real = batch.inputs["attention_mask"].clone()
    assert_same(original, fast, batch, rtol=1e-6)


@pytest.mark.parametrize("name", ["hf.ModernBertModel", "hf.GPT2Model"])
def test_what_explain_says_of_layers_that_remove_padding_each(make_pair, make_batch, name):
    _, fast = make_pair(name)
    batch = make_batch(types=False)
    with torch.no_grad():
        fast(**batch.inputs)
    report = pytorch_ext.explain(fast)
    where = "layers.*" if "Modern" in name else "h.*"
    assert report.padding == [
        f"{where}: removed where a 2-D mask shows some and position 0 is real",
        f"{where}: last forward without padding: 25 of 44 positions were real tokens",
    ]
    assert all(row.inside for row in report.replaced if row.where.startswith(f"{where}."))
    assert not any(row.where.startswith(where) for row in report.left)


def test_what_was_found_of_a_mask_lasts_as_long_as_the_mask_and_its_values():
    layer, x, mask = torch.nn.Identity(), torch.ones(2, 4, 3), padding_mask([4, 2], 4)
    found = pack_once(layer, x, mask, Options(), first=True)
    assert pack_once(layer, x, mask, Options(), first=False) is found
    mask[1, 2] = True  # before a forward whose first layer was taken out
    anew = pack_once(layer, x, mask, Options(), first=False)
    assert anew[0].lengths == [4, 3]
    before = len(_padding._found)
    del mask
    assert len(_padding._found) == before - 1
