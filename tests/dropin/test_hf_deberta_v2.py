"""DeBERTa-v2: the blocks around its attention are fused; the attention and the padding stay."""

import pytest
import torch

import pytorch_ext

RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
}
HEADS = {
    "hf.DebertaV2Model": None,
    "hf.DebertaV2ForMaskedLM": (61, 4, 11),
    "hf.DebertaV2ForSequenceClassification": (2, 4),
    "hf.DebertaV2ForTokenClassification": (2, 4, 11),
}


@pytest.mark.parametrize("kind", ["right", "none"])
@pytest.mark.parametrize("fields", [{}, RELATIVE], ids=["absolute", "relative"])
@pytest.mark.parametrize("name", HEADS)
def test_outputs_losses_and_gradients(make_pair, make_batch, assert_same, name, fields, kind):
    original, fast = make_pair(name, attention="eager", pooler_dropout=0.0, **fields)
    batch = make_batch(kind)
    assert_same(original, fast, batch)
    if HEADS[name]:
        high, *shape = HEADS[name]
        batch.inputs["labels"] = torch.randint(0, high, shape, generator=batch.generator)
    assert_same(original.train(), fast.train(), batch, backward=True)


def test_what_was_done_and_what_was_left(make_pair, make_batch, assert_same):
    original, fast = make_pair("hf.DebertaV2Model", attention="eager")
    report = pytorch_ext.explain(fast)
    assert {row.where for row in report.replaced} >= {
        "encoder.layer.*.output",
        "encoder.layer.*.intermediate",
    }
    left = {row.where: row.note for row in report.left}
    assert left["encoder"].startswith("its attention is disentangled")
    pytorch_ext.revert(fast)
    assert {n: type(m) for n, m in fast.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    assert_same(original, fast, make_batch())


@pytest.mark.parametrize(
    "place", ["output", "output.dense", "output.dropout", "output.LayerNorm", "intermediate"]
)
def test_a_hook_fires(make_pair, make_batch, assert_same, place):
    original, fast = make_pair("hf.DebertaV2Model", attention="eager")
    for model in (original, fast):
        model.encoder.layer[0].get_submodule(place).register_forward_hook(lambda m, args, out: out * 2)
    assert_same(original, fast, make_batch(), backward=True)
