"""What fused layers would pass by: hooks, adapters, parametrizations, modules that were exchanged."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import pytorch_ext

E = 16
REAL = "without padding: 13 of 21 positions were real tokens"


@pytest.mark.parametrize(
    "place", ["layers.1", "layers.1.self_attn", "layers.0.linear1", "layers.1.norm2", "norm"]
)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_hooks_see_padded_tensors(make_encoder, make_tokens, last_forward, batch_first, place):
    original = make_encoder(batch_first=batch_first)
    fast = pytorch_ext.optimize(copy.deepcopy(original))
    x, padding = make_tokens()
    x = x if batch_first else x.transpose(0, 1)
    seen = []
    for model in (original, fast):
        module = model.get_submodule(place)

        def before(module, args, kwargs):
            masks = {name: t for name, t in kwargs.items() if isinstance(t, torch.Tensor)}
            seen.append((args[0], masks))

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(
            lambda m, args, out: (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5
        )
    real = ~padding if batch_first else ~padding.T
    outs = [model.train()(x, src_key_padding_mask=padding)[real] for model in (original, fast)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-9, atol=1e-10)
    (expected, masks), (got, same_masks) = seen
    assert got.shape == expected.shape
    torch.testing.assert_close(got[real], expected[real], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(same_masks, masks)
    assert last_forward(fast) == REAL


def test_hooks_on_all_modules(pair, make_tokens):
    original, fast = pair
    seen = {id(model): [] for model in pair}
    x, padding = make_tokens()
    for model in pair:
        calls = seen[id(model)]
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, args, out, calls=calls: calls.append((type(m).__mro__[-3].__name__, args[0].shape))
        )
        try:
            model.train()(x, src_key_padding_mask=padding)
        finally:
            handle.remove()
    names = [name for name, _ in seen[id(original)]]
    assert names.count("Linear") == 4
    assert [shape for _, shape in seen[id(fast)]] == [shape for _, shape in seen[id(original)]]


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(make_encoder, make_tokens, assert_alike, last_forward, when):
    peft = pytest.importorskip("peft", reason="adapters of peft")
    original = nn.Sequential()
    original.encoder = make_encoder(nested=False)
    original.forward = original.encoder.forward
    fast = copy.deepcopy(original)
    made = []
    for model in (original, fast):
        if when == "before" and model is fast:
            pytorch_ext.optimize(model)
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=2, target_modules=["linear1", "linear2", "self_attn"], init_lora_weights=False
        )
        adapted = peft.inject_adapter_in_model(config, model.encoder).double()
        if when == "after" and model is fast:
            pytorch_ext.optimize(adapted)
        made.append(adapted)
    x, padding = make_tokens()
    assert "lora_A" in "".join(name for name, p in made[1].named_parameters() if p.requires_grad)
    # The outputs alone at first: peft writes merged weights into its attention during a forward.
    expected, got = (model.train()(x, src_key_padding_mask=padding)[~padding] for model in made)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    assert_alike(*made, x, padding)
    assert last_forward(made[1]) == REAL


CHANGES = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer.linear1),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer.linear2),
    "prune": lambda layer: prune.l1_unstructured(layer.linear1, "weight", amount=0.5),
    "in_proj_weight": lambda layer: parametrize.register_parametrization(
        layer.self_attn, "in_proj_weight", Doubled()
    ),
    "out_proj": lambda layer: parametrize.register_parametrization(
        layer.self_attn.out_proj, "weight", Doubled()
    ),
    "dropout": lambda layer: setattr(layer, "dropout1", nn.Identity()),
    "norm": lambda layer: setattr(layer, "norm2", nn.RMSNorm(E).double()),
    "linear": lambda layer: setattr(layer, "linear1", nn.Sequential(nn.Identity(), layer.linear1)),
    "forward": lambda layer: setattr(layer.self_attn, "forward", layer.self_attn.forward),
}


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_was_changed(make_encoder, make_tokens, assert_alike, last_forward, change, when):
    original = make_encoder(nested=False)
    fast = copy.deepcopy(original)
    if when == "after":
        pytorch_ext.optimize(fast)
    for model in (original, fast):
        torch.manual_seed(0)
        CHANGES[change](model.layers[1])
    if when == "before":
        pytorch_ext.optimize(fast)
    assert_alike(original, fast, *make_tokens())
    assert last_forward(fast) == REAL
