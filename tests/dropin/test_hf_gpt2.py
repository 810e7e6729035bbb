"""GPT-2: with a cache of keys and values it goes its original way, without one it loses its padding."""

import pytest
import torch

import pytorch_ext


def last_forward(model):
    return next(line for line in pytorch_ext.explain(model).padding if "last forward" in line)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_generation(make_pair, beams, padded):
    original, fast = make_pair("hf.GPT2LMHeadModel", use_cache=True, eos_token_id=None)
    ids = torch.randint(3, 61, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    expected, got = (m.generate(ids, attention_mask=mask, **options) for m in (original, fast))
    assert torch.equal(got, expected)
    assert last_forward(fast).endswith("dense: it fills a cache of keys and values")


@pytest.mark.parametrize("kind", ["right", "left", "none"])
def test_a_cache_is_filled_as_ever(make_pair, make_batch, assert_same, kind):
    original, fast = make_pair("hf.GPT2Model", use_cache=True)
    batch = make_batch(kind, types=False)
    assert_same(original, fast, batch, backward=True)
    caches = [m(**batch.inputs).past_key_values for m in (original, fast)]
    for theirs, ours in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(
            ours.keys.transpose(1, 2)[batch.real],
            theirs.keys.transpose(1, 2)[batch.real],
            rtol=1e-9,
            atol=1e-11,
        )


@pytest.mark.parametrize("fields", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_other_scales(make_pair, make_batch, assert_same, fields):
    original, fast = make_pair("hf.GPT2Model", **fields)
    assert_same(original, fast, make_batch(types=False), backward=True)


@pytest.mark.parametrize("fields", [{"add_cross_attention": True}, {"reorder_and_upcast_attn": True}])
def test_what_is_left_alone(make_pair, make_batch, assert_same, fields):
    original, fast = make_pair("hf.GPT2Model", **fields)
    assert {row.where for row in pytorch_ext.explain(fast).left} >= {"h.*"}
    assert_same(original, fast, make_batch(types=False), backward=True)


@pytest.mark.parametrize("backend", ["native", "cpu"])
def test_transposed_weights_follow_their_originals(make_pair, make_batch, backend):
    """The kernels of the CPU want a weight as linear layers hold it: a copy, which must not go stale."""
    if backend not in pytorch_ext.backends.available():
        pytest.skip(f"the backend {backend} is not built here")
    original, fast = make_pair("hf.GPT2Model", backend=backend, dtype=torch.float32)
    batch = make_batch(types=False)
    with torch.no_grad():
        for _ in range(2):
            expected, got = (m(**batch.inputs).last_hidden_state[batch.real] for m in (original, fast))
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
            for model in (original, fast):
                model.h[0].mlp.c_fc.weight.data.mul_(0.5)
