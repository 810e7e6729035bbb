"""Every family of Hugging Face's encoders against its untouched self: outputs, gradients, and what surrounds them.

BERT itself is looked at in more detail in the files beside this one; what one family has and no other, in test_hf_*.py.
"""

import copy
import io
import pickle

import pytest
import torch
from torch.func import functional_call
from torch.nn.utils import parametrize

import pytorch_ext
from pytorch_ext.testing import assert_contract, normal

# Base model -> where its layers are.
MODELS = {
    "hf.RobertaModel": "encoder.layer",
    "hf.XLMRobertaModel": "encoder.layer",
    "hf.CamembertModel": "encoder.layer",
    "hf.ElectraModel": "encoder.layer",
    "hf.DistilBertModel": "transformer.layer",
    "hf.MPNetModel": "encoder.layer",
    "hf.AlbertModel": "encoder.albert_layer_groups.0.albert_layers",
    "hf.ModernBertModel": "layers",
    "hf.GPT2Model": "h",
}
MASKS = ["right", "left", "holes", "full", "none", "one token", "all padding", "4-D additive"]
# ModernBERT turns its queries and keys in float32 whatever the dtype: float64 runs differ by float32's rounding.
LOOSE = {"rtol": 1e-4, "atol": 1e-5}
# A module inside a layer that computes, and one that only holds others.
INNER = {
    "hf.DistilBertModel": ("ffn.lin1", "ffn"),
    "hf.MPNetModel": ("attention.attn.q", "attention.attn"),
    "hf.AlbertModel": ("ffn", "attention"),
    "hf.ModernBertModel": ("mlp.Wi", "attn"),
    "hf.GPT2Model": ("attn.c_proj", "mlp"),
}


def tolerance(name):
    return LOOSE if "ModernBert" in name else {}


def eager_for(name):
    """These have no other attention."""
    return "eager" if any(n in name for n in ("MPNet", "RoFormer", "MegatronBert", "RemBert")) else "sdpa"


def layer(model, name, number=-1):
    return model.get_submodule(MODELS[name])[number]


@pytest.fixture(scope="session")
def pair_and_batch(make_pair, make_batch):
    def make(name, kind="right", *, mask_dtype=torch.int64, **options):
        original, fast = make_pair(name, attention=eager_for(name), **options)
        dtype = torch.float64 if kind == "4-D additive" else mask_dtype
        return original, fast, make_batch(kind, dtype=dtype, types=False)

    return make


@pytest.fixture(scope="session")
def last_forward():
    def find(model):
        lines = [line for line in pytorch_ext.explain(model).padding if "last forward" in line]
        return lines[0].partition("last forward ")[2]

    return find


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_under_every_mask(pair_and_batch, assert_same, name, kind):
    original, fast, batch = pair_and_batch(name, kind)
    assert_same(original, fast, batch)
    assert_same(original.train(), fast.train(), batch, backward=True, **tolerance(name))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", MODELS)
def test_every_backend(pair_and_batch, assert_same, name, backend):
    if backend not in pytorch_ext.backends.available():
        pytest.skip(f"the backend {backend} is not built here")
    dtype = torch.float64 if backend == "reference" else torch.float32
    original, fast, batch = pair_and_batch(name, backend=backend, dtype=dtype)
    close = tolerance(name) if backend == "reference" else {"rtol": 2e-3, "atol": 2e-4}
    assert_same(original, fast, batch, backward=True, **close)
    assert_same(original, fast, batch, **close)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("backend", ["native", pytest.param("cpu", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", MODELS)
def test_the_numerical_contract(pair_and_batch, name, backend, dtype):
    """The error against float64, of outputs and of the gradient of every parameter, beside that of the original.

    Over many seeds: a bias has few elements, and the largest error among few is a matter of luck.
    """
    if backend not in pytorch_ext.backends.available():
        pytest.skip(f"the backend {backend} is not built here")
    original, fast, batch = pair_and_batch(name, backend=backend)

    def make(generator):
        # Small enough that no softmax is nearly one key's alone: that would magnify every rounding.
        return {n: 0.5 * p + 0.05 * normal(generator, *p.shape) for n, p in original.state_dict().items()}

    def last_hidden_state(model):
        model = copy.deepcopy(model)

        def call(**parameters):
            return functional_call(model, parameters, (), batch.inputs).last_hidden_state[batch.real]

        return call

    ours, eager = last_hidden_state(fast), last_hidden_state(original)
    assert_contract(ours, eager, make, dtype, seeds=range(32))
    with torch.no_grad():  # another path: weights laid out for inference
        assert_contract(ours, eager, make, dtype, gradients=False)


@pytest.mark.parametrize("remove_padding", ["auto", True, False])
@pytest.mark.parametrize("name", MODELS)
def test_when_padding_is_removed(pair_and_batch, last_forward, name, remove_padding):
    _, fast, batch = pair_and_batch(name, remove_padding=remove_padding)
    with torch.no_grad():
        out = fast(**batch.inputs).last_hidden_state
    expected = "without padding: 25 of 44 positions were real tokens"
    if not remove_padding:
        expected = "dense: optimize was told remove_padding=False"
    assert last_forward(fast) == expected
    if remove_padding and "final_norm" not in dict(fast.named_modules()) and "GPT2" not in name:
        assert not out[~batch.real].any()


@pytest.mark.parametrize("kind", ["right", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states(pair_and_batch, assert_same, name, kind):
    original, fast, batch = pair_and_batch(name, kind)
    batch.inputs["output_hidden_states"] = True
    assert_same(original, fast, batch, backward=True, **tolerance(name))


@pytest.mark.parametrize("name", MODELS)
def test_attention_weights(pair_and_batch, assert_same, name):
    # Float64 masks overflow in ModernBERT's eager attention, which is in float32.
    original, fast, batch = pair_and_batch(name, "full" if "ModernBert" in name else "right")
    original.set_attn_implementation("eager")
    batch.inputs["output_attentions"] = True
    assert_same(original, fast, batch, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_revert_gives_back_what_was(pair_and_batch, name):
    original, fast, batch = pair_and_batch(name)
    assert any(type(m) is not type(original.get_submodule(n)) for n, m in fast.named_modules())
    pytorch_ext.revert(fast)
    assert {n: type(m) for n, m in fast.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    assert fast.config._attn_implementation == eager_for(name)
    with torch.no_grad():
        expected, got = (m(**batch.inputs).last_hidden_state for m in (original, fast))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_optimising_twice_changes_nothing(pair_and_batch, name):
    _, fast, _ = pair_and_batch(name)
    before = {n: type(m) for n, m in fast.named_modules()}
    config = fast.config
    pytorch_ext.optimize(fast)
    assert {n: type(m) for n, m in fast.named_modules()} == before
    assert fast.config is config


@pytest.mark.parametrize("name", MODELS)
def test_saved_copied_and_pickled(pair_and_batch, transformers, tmp_path, name):
    _, fast, batch = pair_and_batch(name)
    fast.save_pretrained(tmp_path)
    loaded = getattr(transformers, name.partition(".")[2]).from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.architectures == [name.partition(".")[2]]
    held = io.BytesIO()
    torch.save(fast, held)
    held.seek(0)
    others = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(held, weights_only=False)]
    with torch.no_grad():
        expected = fast(**batch.inputs).last_hidden_state
        for model in others:
            assert torch.equal(model(**batch.inputs).last_hidden_state, expected)
        plain = loaded.eval()(**batch.inputs).last_hidden_state
    torch.testing.assert_close(plain[batch.real], expected[batch.real], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("place", ["layer", "leaf", "container"])
@pytest.mark.parametrize("name", INNER)
def test_a_hook_fires_and_sees_padded_tensors(pair_and_batch, assert_same, name, place):
    original, fast, batch = pair_and_batch(name)
    inside = {"layer": "", "leaf": INNER[name][0], "container": INNER[name][1]}[place]
    seen = []
    for model in (original, fast):
        shapes = []
        module = layer(model, name).get_submodule(inside)
        module.register_forward_hook(
            lambda m, args, out, found=shapes: found.append((out[0] if isinstance(out, tuple) else out).shape)
        )
        seen.append(shapes)
    assert_same(original, fast, batch, backward=True, **tolerance(name))
    assert seen[0] and seen[1] == seen[0]


@pytest.mark.parametrize("name", INNER)
def test_parametrizations(pair_and_batch, assert_same, halved, name):
    original, fast, batch = pair_and_batch(name)
    for model in (original, fast):
        parametrize.register_parametrization(
            layer(model, name).get_submodule(INNER[name][0]), "weight", halved()
        )
    assert_same(original, fast, batch, backward=True, **tolerance(name))
    assert_same(original, fast, batch)


# The other two know no checkpointing.
CHECKPOINTED = [name for name in MODELS if "MPNet" not in name and "Albert" not in name]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_activation_checkpointing(pair_and_batch, assert_same, name, reentrant):
    original, fast, batch = pair_and_batch(name)
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        fast.enable_input_require_grads()
    assert_same(original.train(), fast.train(), batch, backward=True, **tolerance(name))


@pytest.mark.parametrize("name", [name for name in MODELS if "MPNet" not in name])
def test_flattened_batches(pair_and_batch, name):
    """Sequences laid end to end in one row, as DataCollatorWithFlattening makes them, with their lengths."""
    original, fast, batch = pair_and_batch(name)
    ids, lengths = batch.inputs["input_ids"], batch.real.sum(1)
    ids = ids.masked_fill(ids == 1, 3)  # 1 would be padding for some
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    first = 2 if fast.config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    flat = {
        "input_ids": ids[batch.real][None],
        "position_ids": torch.cat([first + torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }
    # Padding has the id by which these count their positions.
    padded = ids.masked_fill(~batch.real, 1)
    with torch.no_grad():
        expected = original(padded, attention_mask=batch.inputs["attention_mask"]).last_hidden_state
        got = fast(**flat).last_hidden_state
    assert got.shape == (1, int(lengths.sum()), 32)
    torch.testing.assert_close(got[0], expected[batch.real], rtol=1e-6, atol=1e-7)


COMPILED = ["hf.RobertaModel", "hf.ModernBertModel", "hf.MPNetModel", "hf.GPT2Model", "hf.AlbertModel"]


@pytest.mark.parametrize(
    "name", [COMPILED[0], *(pytest.param(name, marks=pytest.mark.full) for name in COMPILED[1:])]
)
def test_compiled_without_a_graph_break(pair_and_batch, name):
    original, fast, batch = pair_and_batch(name, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = original(**batch.inputs).last_hidden_state
        got = compiled(**batch.inputs).last_hidden_state
    torch._dynamo.reset()
    torch.testing.assert_close(got[batch.real], expected[batch.real], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["right", "none"])
@pytest.mark.parametrize("name", [*INNER, "hf.RobertaModel"])
def test_every_dropout_is_where_it_was(pair_and_batch, assert_same, name, kind):
    """One after the other drops everything, which no draw can change."""
    original, fast, batch = pair_and_batch(name, kind)
    places = [n for n, m in layer(original, name, 0).named_modules() if isinstance(m, torch.nn.Dropout)]
    rates = [n for n in ("attn.attention_dropout",) if "ModernBert" in name]
    assert places or rates
    for place in places + rates:
        held = []
        for model in (original.train(), fast.train()):
            above, _, last = (f"{place}.p" if place in places else place).rpartition(".")
            module = layer(model, name, 0).get_submodule(above)
            held.append((module, last, getattr(module, last)))
            setattr(module, last, 1.0)
        assert_same(original, fast, batch, backward=True, **tolerance(name))
        for module, last, value in held:
            setattr(module, last, value)


@pytest.mark.parametrize("name", INNER)
def test_under_autocast(pair_and_batch, values, assert_rounds_alike, name):
    original, fast, batch = pair_and_batch(name, dtype=torch.float32)
    with torch.no_grad():
        exact = values(original(**batch.inputs), batch.real)["last_hidden_state"]
        found = []
        for model in (original, fast):
            with torch.autocast("cpu", torch.bfloat16):
                found.append(values(model(**batch.inputs), batch.real)["last_hidden_state"])
    expected, got = found
    assert got.dtype == expected.dtype
    assert_rounds_alike(got, expected, exact)


STRANGERS = [
    "RoFormer",
    "MegatronBert",
    "RemBert",
    "LayoutLM",
    "Data2VecText",
    "Ernie",
    "RobertaPreLayerNorm",
    "XLMRobertaXL",
]


@pytest.mark.parametrize("family", STRANGERS)
def test_other_families_keep_all_but_norms_and_activations(pair_and_batch, assert_same, family):
    name = f"hf.{family}Model"
    original, fast, batch = pair_and_batch(name)
    swapped = {
        type(original.get_submodule(n)).__name__
        for n, m in fast.named_modules()
        if type(m) is not type(original.get_submodule(n))
    }
    assert swapped == {"LayerNorm", "GELUActivation"}
    assert {row.note for row in pytorch_ext.explain(fast).left} == {"no rule for it"}
    assert fast.config._attn_implementation == original.config._attn_implementation
    assert_same(original, fast, batch, backward=True)
