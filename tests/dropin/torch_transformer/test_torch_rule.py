"""What optimize does to PyTorch's Transformer modules, when it removes padding, and what survives it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import pytorch_ext
from pytorch_ext import models, ops

N, S, E, H = 3, 7, 16, 4
REAL = "without padding: 13 of 21 positions were real tokens"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lengths", [[7, 2, 4], [7, 7, 7], [7, 0, 3], None], ids=str)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_an_encoder(make_encoder, make_tokens, assert_alike, last_forward, lengths, norm_first, training):
    original = make_encoder(norm_first=norm_first)
    fast = pytorch_ext.optimize(copy.deepcopy(original))
    x, padding = make_tokens(lengths or (7, 2, 4))
    assert_alike(original, fast, x, padding if lengths else None, training=training)
    assert (
        last_forward(fast)
        == {
            "[7, 2, 4]": REAL,
            "[7, 7, 7]": "dense: the batch has no padding",
            "[7, 0, 3]": "dense: position 0 of sequence 1 is padding, and heads may read position 0",
            "None": "dense: no mask was given",
        }[str(lengths)]
    )


def test_nothing_of_pytorchs_fused_path_runs(pair, make_tokens, monkeypatch, calls):
    """It would pass by our norms and our attention, and hand nested tensors to the layers."""

    def forbidden(*args, **kwargs):
        raise AssertionError("PyTorch's fused path ran")

    for name in (
        "_transformer_encoder_layer_fwd",
        "_native_multi_head_attention",
        "_nested_tensor_from_mask",
    ):
        monkeypatch.setattr(torch, name, forbidden)
    original, fast = pair
    x, padding = make_tokens()
    with pytest.raises(AssertionError, match="fused path ran"), torch.no_grad():
        original(x, src_key_padding_mask=padding)
    for masks in ({}, {"mask": torch.zeros(S, S, dtype=torch.float64)}, {"src_key_padding_mask": padding}):
        with torch.no_grad():
            assert not fast(x, **masks).is_nested
    assert (calls.packed, calls.dense) == (2, 4)


@pytest.mark.parametrize("remove_padding", ["auto", True, False])
def test_the_padding_rule(pair, make_tokens, assert_alike, last_forward, remove_padding):
    original, _ = pair
    fast = pytorch_ext.optimize(copy.deepcopy(original), remove_padding=remove_padding)
    x, padding = make_tokens()
    for hidden, auto in ((padding, REAL), (padding.flip(1), "dense: position 0 of sequence 1 is padding")):
        assert_alike(original, fast, x, hidden)
        said = {"auto": auto, True: REAL, False: "dense: optimize was told remove_padding=False"}
        assert last_forward(fast).startswith(said[remove_padding])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_padding_rule_within_a_transformer(randomised, make_tokens, last_forward):
    original = randomised(nn.Transformer(E, H, 1, 1, 24, 0.0, batch_first=True, norm_first=True).double())
    src, padding = make_tokens()
    tgt = src[:, :5] * 0.5
    masks = {"src_key_padding_mask": padding}
    for remove_padding, given, expected in (
        ("auto", {"memory_key_padding_mask": padding}, REAL),
        ("auto", {}, "dense: memory_key_padding_mask lets the decoder attend its padding"),
        (True, {}, REAL),
        (False, {"memory_key_padding_mask": padding}, "dense: optimize was told remove_padding=False"),
    ):
        fast = pytorch_ext.optimize(copy.deepcopy(original), remove_padding=remove_padding)
        out = fast(src, tgt, **masks, **given)
        assert last_forward(fast) == expected
        if remove_padding is not True:
            torch.testing.assert_close(out, original(src, tgt, **masks, **given), rtol=1e-9, atol=1e-10)


def test_explain():
    model = nn.ModuleDict(
        {
            "transformer": nn.Transformer(E, H, 2, 2, 24, batch_first=True),
            "zero": nn.MultiheadAttention(E, H, add_zero_attn=True),
            "bias": nn.MultiheadAttention(E, H, add_bias_kv=True),
            "ours": pytorch_ext.nn.TransformerEncoderLayer(E, H),
        }
    )
    report = pytorch_ext.explain(pytorch_ext.optimize(model))
    seen = {row.where: row.was for row in report.replaced if not row.inside}
    assert seen["transformer"] == "Transformer"
    assert seen["transformer.encoder.layers.*"] == seen["transformer.decoder.layers.*"].replace("De", "En")
    assert seen["ours"] == "pytorch_ext.nn.TransformerEncoderLayer"
    assert "transformer.encoder.layers.*.self_attn" not in seen
    left = {row.where: row.note for row in report.left}
    assert left["zero"] == "it adds a key and value of zeros (add_zero_attn)"
    assert left["bias"] == "it adds a learned key and value (add_bias_kv)"


def test_what_is_left_alone_goes_pytorchs_way(
    randomised, make_encoder, make_tokens, assert_alike, last_forward
):
    """Attention that adds keys, put into a layer by hand: called as it is, and all around it is fused."""
    original = make_encoder(layers=1, nested=False)
    odd = nn.MultiheadAttention(E, H, add_bias_kv=True, add_zero_attn=True, batch_first=True)
    original.layers[0].self_attn = randomised(odd.double())
    fast = pytorch_ext.optimize(copy.deepcopy(original))
    assert type(fast.layers[0].self_attn) is nn.MultiheadAttention
    assert_alike(original, fast, *make_tokens())
    assert last_forward(fast) == REAL


@pytest.mark.parametrize("theirs", [True, False], ids=["torch.nn", "pytorch_ext.nn"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_revert_and_twice(randomised, theirs):
    package = nn if theirs else pytorch_ext.nn
    original = randomised(package.Transformer(E, H, 1, 1, 24, 0.0).double())
    fast = copy.deepcopy(original)
    kinds = [type(m) for m in fast.modules()]
    inputs = torch.randn(S, N, E, dtype=torch.float64), torch.randn(5, N, E, dtype=torch.float64)
    expected = original(*inputs)
    with pytorch_ext.optimized(fast):
        swapped = [type(m) for m in fast.modules()]
        pytorch_ext.optimize(fast)
        assert [type(m) for m in fast.modules()] == swapped
        assert type(fast).forward is not kinds[0].forward
        torch.testing.assert_close(fast(*inputs), expected, rtol=1e-9, atol=1e-10)
        assert all(isinstance(m, cls) for m, cls in zip(fast.modules(), kinds, strict=True))
        assert list(fast.state_dict()) == list(original.state_dict())
    assert [type(m) for m in fast.modules()] == kinds
    assert vars(fast).keys() == vars(original).keys()
    torch.testing.assert_close(fast(*inputs), expected)


def test_copies_and_files(make_encoder, pair, make_tokens, assert_alike, last_forward):
    original, fast = pair
    x, padding = make_tokens()
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(buffer, weights_only=False),
    ):
        assert_alike(original, other, x, padding)
        assert last_forward(other) == REAL
    fresh = make_encoder()
    fresh.load_state_dict(fast.state_dict())
    assert_alike(original, fresh, x, padding)


def test_shared_weights(make_encoder, make_tokens, assert_alike):
    original = make_encoder(nested=False)
    original.layers[1] = original.layers[0]
    fast = pytorch_ext.optimize(copy.deepcopy(original))
    assert fast.layers[1] is fast.layers[0]
    assert_alike(original, fast, *make_tokens())
    original.layers[1] = copy.deepcopy(original.layers[0])
    original.layers[1].linear1.weight = original.layers[0].linear1.weight
    fast = pytorch_ext.optimize(copy.deepcopy(original))
    assert_alike(original, fast, *make_tokens())


def test_weights_may_change_between_calls(pair, make_tokens, assert_alike):
    """Inference may have laid them out."""
    original, fast = pair
    x, padding = make_tokens()
    assert_alike(original, fast, x, padding, training=False)
    for model in pair:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True, eps=1e-3)
        model(x, src_key_padding_mask=padding)[~padding].sin().sum().backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
    expected, got = ([m.train()(x, src_key_padding_mask=padding)[~padding]] for m in pair)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_backend_that_was_asked_for(make_encoder, make_tokens, monkeypatch, backend):
    fast = pytorch_ext.optimize(make_encoder(), backend=backend)
    chosen = set()
    choose = ops.linear.__globals__["choose"]
    monkeypatch.setitem(
        ops.linear.__globals__, "choose", lambda *args: chosen.add(choose(*args)) or choose(*args)
    )
    x, padding = make_tokens()
    with pytorch_ext.backends.use("cpu"):
        fast(x, src_key_padding_mask=padding)
    assert chosen == {backend}


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_classifier_of_a_tutorial_runs_without_padding(
    randomised, last_forward, make_batch, fused_layers, norm_first
):
    model = models.TransformerClassifier(61, 3, 32, 2, 4, 48, 24, dropout=0.0, norm_first=norm_first)
    fast = pytorch_ext.optimize(randomised(model.double().eval()))
    batch = make_batch("right", types=False)
    assert fused_layers(fast, batch.inputs) == 2
    assert last_forward(fast) == "without padding: 25 of 44 positions were real tokens"


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_laid_out_weights_are_counted_and_dropped():
    """Those of the attention to the memory are laid out by parts of one weight."""
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 128, 0.0, batch_first=True), 1).eval()
    fast = pytorch_ext.optimize(model, backend="cpu")
    tgt, memory = torch.randn(2, 40, 64), torch.randn(2, 50, 64)
    with torch.no_grad():
        fast(tgt, memory)
    products = fast.state_dict()
    weights = sum(t.nbytes for name, t in products.items() if t.dim() == 2)
    assert pytorch_ext.explain(fast).layout_bytes >= weights
    pytorch_ext.refresh(fast)
    assert pytorch_ext.explain(fast).layout_bytes == 0
