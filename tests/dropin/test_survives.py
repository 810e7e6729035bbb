"""What users do to models: copies, files, dtypes, shared configs, functional calls."""

import copy
import io
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch.func import functional_call

import pytorch_ext

MODELS = ["hf.BertModel", "px.BertModel"]
HEADS = ["hf.BertForMaskedLM", "px.BertForMaskedLM", "hf.BertForSequenceClassification"]

# Run in a process of its own, where nothing has imported transformers or registered an attention implementation.
LOAD_AND_RUN = """
import sys, torch
assert "pytorch_ext" not in sys.modules and "transformers" not in sys.modules
model, inputs, real, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    out = model(**inputs).last_hidden_state
torch.testing.assert_close(out[real], expected[real], rtol=1e-9, atol=1e-11)
assert not out[~real].any(), "padding was not removed"
import pytorch_ext
assert ("transformers" in sys.modules) == type(model).__module__.startswith("transformers")
print(*(line for line in pytorch_ext.explain(model).padding), sep="\\n")
pytorch_ext.revert(model)
with torch.no_grad():
    torch.testing.assert_close(model(**inputs).last_hidden_state[real], expected[real], rtol=1e-9, atol=1e-11)
"""


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("when", ["before a forward", "after a forward"])
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", MODELS)
def test_copies(make_pair, make_batch, assert_same, fused_layers, name, way, when):
    original, fast = make_pair(name, backend="native")
    batch = make_batch()
    if when == "after a forward":
        fused_layers(fast, batch.inputs)
    other = COPIES[way](fast)
    assert_same(original, other, batch, backward=True)
    assert fused_layers(other, batch.inputs) == 2
    assert pytorch_ext.explain(other).replaced == pytorch_ext.explain(fast).replaced
    for module, twin in zip(other.modules(), fast.modules(), strict=True):
        assert type(module) is type(twin)
        assert module is not twin

    # And each goes its own way.
    other.encoder.layer[0].attention.self.query.weight.data.zero_()
    assert_same(original, fast, batch)
    pytorch_ext.revert(other)
    assert fused_layers(fast, batch.inputs) == 2
    assert {n: type(m) for n, m in other.named_modules()} == {n: type(m) for n, m in original.named_modules()}


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_after_recording(make_pair, make_batch, assert_same, fused_layers, name):
    """Hugging Face's recorders are on the layers from then on, of the copy too."""
    original, fast = make_pair(name)
    batch = make_batch()
    fast(**batch.inputs, output_hidden_states=True)
    other = copy.deepcopy(fast)
    assert fused_layers(other, batch.inputs) == 2
    batch.inputs["output_hidden_states"] = True
    assert_same(original, other, batch)


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_a_file_loaded_in_another_process(make_pair, make_batch, tmp_path, name):
    original, fast = make_pair(name)
    batch = make_batch("holes")
    with torch.no_grad():
        expected = original(**batch.inputs).last_hidden_state
    torch.save((fast, batch.inputs, batch.real, expected), tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_RUN, tmp_path / "model.pt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "without padding: 16 of 44 positions were real tokens" in done.stdout


@pytest.mark.parametrize("name", HEADS)
def test_state_dicts_go_both_ways(make_pair, make_batch, assert_same, name):
    original, fast = make_pair(name)
    state = fast.state_dict()
    assert list(state) == list(original.state_dict())
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert [n for n, _ in fast.named_buffers()] == [n for n, _ in original.named_buffers()]
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in original.named_modules()]
    batch = make_batch()
    changed = {n: t * 1.5 if t.is_floating_point() else t for n, t in state.items()}
    for model in (original, fast):
        model.load_state_dict(changed, strict=True)
    assert_same(original, fast, batch)
    original.load_state_dict({n: t / 2 for n, t in fast.state_dict().items()}, strict=True)
    fast.load_state_dict(original.state_dict(), strict=True)
    assert_same(original, fast, batch)


@pytest.mark.parametrize("name", HEADS)
def test_checkpoint_folders(transformers, make_pair, make_batch, assert_same, tmp_path, name):
    original, fast = make_pair(name)
    original.save_pretrained(tmp_path / "original")
    fast.save_pretrained(tmp_path / "fast")
    texts = [(tmp_path / folder / "config.json").read_text() for folder in ("original", "fast")]
    assert json.loads(texts[1]) == json.loads(texts[0])
    assert json.loads(texts[1])["architectures"] == [name.partition(".")[2]]
    for text in (texts[1], fast.config.to_json_string() if name.startswith("hf") else ""):
        assert "pytorch_ext" not in text
    loaded = type(original).from_pretrained(tmp_path / "fast", dtype=torch.float64)
    assert not list(pytorch_ext.explain(loaded).replaced)
    assert_same(original, loaded, make_batch())
    assert_same(original, pytorch_ext.optimize(loaded), make_batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HEADS)
def test_other_dtypes(make_pair, make_batch, values, assert_rounds_alike, name, dtype):
    original, fast = make_pair(name)
    batch = make_batch()
    with torch.no_grad():
        exact = values(original(**batch.inputs), batch.real)["logits"]
        expected = values(original.to(dtype)(**batch.inputs), batch.real)["logits"]
        got = values(fast.to(dtype)(**batch.inputs), batch.real)["logits"]
    assert got.dtype == expected.dtype == dtype
    assert_rounds_alike(got, expected, exact)
    assert fast.half() is fast
    assert next(fast.parameters()).dtype == torch.float16


def test_to_the_meta_device_and_back(make_pair, make_batch, assert_same):
    original, fast = make_pair("px.BertModel")
    fast.to("meta")
    assert fast(torch.ones(2, 3, dtype=torch.int64, device="meta")).pooler_output.shape == (2, 32)
    fast.to_empty(device="cpu")
    fast.load_state_dict(original.state_dict())
    fast.embeddings.position_ids.copy_(original.embeddings.position_ids)
    assert_same(original, fast, make_batch())


@pytest.mark.parametrize("name", HEADS[:2])
def test_functional_calls(make_pair, make_batch, values, name):
    original, fast = make_pair(name)
    batch = make_batch()
    found = []
    for model in (original, fast):
        parameters = {n: (p.detach() * 1.2).requires_grad_() for n, p in model.named_parameters()}
        out = functional_call(model, parameters, (), batch.inputs)
        out.logits[batch.real].sin().sum().backward()
        found.append({**values(out, batch.real), **{n: p.grad for n, p in parameters.items()}})
    for parameter, gradient in found[0].items():
        if gradient is not None:
            torch.testing.assert_close(found[1][parameter], gradient, rtol=1e-9, atol=1e-11, msg=parameter)


def test_two_models_with_one_config(transformers, make_model, make_batch, assert_same, fused_layers):
    original = make_model()
    first, second = (type(original)(original.config).double().eval() for _ in range(2))
    for model in (first, second):
        model.load_state_dict(original.state_dict())
    assert first.config is second.config is original.config
    pytorch_ext.optimize(first)
    assert second.config is original.config
    assert second.config._attn_implementation == "sdpa"
    assert first.config is not original.config
    batch = make_batch()
    for model in (first, second):
        assert_same(original, model, batch)
    pytorch_ext.optimize(second)
    assert second.config is not first.config
    assert fused_layers(first, batch.inputs) == fused_layers(second, batch.inputs) == 2
    pytorch_ext.revert(first)
    assert first.config is original.config
    assert fused_layers(second, batch.inputs) == 2
    pytorch_ext.revert(second)
    assert second.config is first.config
    assert_same(first, second, batch)


def test_every_module_of_a_model_shares_its_new_config(make_pair):
    _, fast = make_pair("hf.BertForMaskedLM")
    configs = {id(m.config) for m in fast.modules() if hasattr(m, "config")}
    assert len(configs) == 1


@pytest.mark.parametrize("name", MODELS)
def test_resized_embeddings(make_pair, make_batch, assert_same, name):
    original, fast = make_pair(name)
    for model in (original, fast):
        torch.manual_seed(0)
        if name.startswith("hf"):
            model.resize_token_embeddings(70, mean_resizing=False)
        else:
            model.embeddings.word_embeddings = torch.nn.Embedding(70, 32, padding_idx=0).double()
    batch = make_batch()
    batch.inputs["input_ids"][0, :3] = 69
    assert_same(original, fast, batch, backward=True)


def test_ids_out_of_range_raise_as_before(make_pair):
    original, fast = make_pair()
    for model in (original, fast):
        with pytest.raises(IndexError):
            model(torch.tensor([[61]]))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.ones(1, 25, dtype=torch.int64))
