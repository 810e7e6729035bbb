"""torch.compile and torch.export of an optimised model."""

import copy
import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import pytorch_ext
from pytorch_ext import backends
from pytorch_ext.testing import padding_mask

MODELS = ["hf.BertModel", "px.BertModel"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BATCHES = [([11, 5, 2, 8], 11), ([3, 9, 4, 4], 11), ([7, 1, 6, 3, 2], 7), ([20, 3], 20)]


def batch_of(lengths, seqlen, mask=True):
    """Inputs, and at which positions their results count."""
    generator = torch.Generator().manual_seed(seqlen)
    real = padding_mask(lengths, seqlen)
    inputs = {"input_ids": torch.randint(1, 61, real.shape, generator=generator)}
    return (inputs | {"attention_mask": real.long()}, real) if mask else (inputs, torch.ones_like(real))


@pytest.fixture
def make_pair(make_pair):
    """One layer, where nothing else is asked for: compiling is slow."""
    return functools.partial(make_pair, num_hidden_layers=1)


@pytest.fixture
def check(run):
    def check(original, compiled, inputs, real, *, backward=False, removed=None, rtol=1e-9, atol=1e-11):
        expected = run(original, inputs, real, backward=backward)
        got = run(compiled, inputs, real, backward=backward)
        torch.testing.assert_close(got[0], expected[0], rtol=rtol, atol=atol)
        for name, gradient in expected[1].items():
            other = got[1].get(name, got[1].get(f"_orig_mod.{name}"))
            torch.testing.assert_close(other, gradient, rtol=rtol, atol=atol, msg=name)
        if removed is not None:
            with torch.no_grad():
                padded = compiled(**inputs).last_hidden_state[~real]
            assert padded.numel()
            assert bool(padded.any()) is not removed

    return check


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("name", MODELS)
def test_a_full_graph_for_any_shape(make_pair, check, name, mask):
    """One graph serves all batches: how many tokens are real differs from one to the next."""
    original, fast = make_pair(name)
    counter, compilations = CompileCounterWithBackend("eager"), []
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend=counter)
    for lengths, seqlen in BATCHES:
        inputs, real = batch_of(lengths, seqlen, mask)
        check(original, compiled, inputs, real, removed=True if mask else None)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


def test_gradients_through_a_full_graph_for_any_shape(make_pair, check):
    original, fast = make_pair()
    counter, compilations = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend=counter)
    for lengths, seqlen in BATCHES:
        check(original, compiled, *batch_of(lengths, seqlen), backward=True)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


@pytest.mark.parametrize("remove_padding", [True, False])
def test_full_graph_with_padding_kept_or_removed_by_force(make_pair, check, remove_padding):
    original, fast = make_pair(remove_padding=remove_padding)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    inputs, real = batch_of([11, 5, 1, 8], 11)
    check(original, compiled, inputs, real, removed=remove_padding)


@pytest.mark.parametrize(
    ("name", "capture"),
    [
        ("hf.BertModel", True),
        pytest.param("hf.BertModel", False, marks=pytest.mark.full),
        pytest.param("px.BertModel", False, marks=pytest.mark.long),
    ],
)
def test_plain_compile_with_and_without_the_switch(make_pair, check, name, capture):
    """The number of real tokens depends on the data: Dynamo breaks the graph there unless it is told to go on."""
    original, fast = make_pair(name)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(fast, backend=counter)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=capture):
        for lengths in ([11, 5, 1, 8], [3, 9, 4, 4]):
            inputs, real = batch_of(lengths, 11)
            check(original, compiled, inputs, real, removed=True)
        assert (counter.frame_count == 1) == capture
        check(original, compiled, inputs, real, backward=True)


def test_left_padding_is_removed_too(make_pair):
    """A compiled graph cannot look whether position 0 is padding: what a pooler makes of it then differs."""
    original, fast = make_pair(init={"add_pooling_layer": False})
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    inputs, real = batch_of([11, 5, 1, 8], 11)
    inputs["attention_mask"], real = inputs["attention_mask"].flip(1), real.flip(1)
    with torch.no_grad():
        expected, got = original(**inputs).last_hidden_state, compiled(**inputs).last_hidden_state
    torch.testing.assert_close(got[real], expected[real], rtol=1e-9, atol=1e-11)
    assert not got[~real].any()


def test_optimize_sets_no_switch(make_model):
    before = torch._dynamo.config.get_config_copy()
    pytorch_ext.optimize(make_model())
    assert torch._dynamo.config.get_config_copy() == before


@pytest.mark.full
@pytest.mark.parametrize("name", ["hf.BertModel", pytest.param("px.BertModel", marks=pytest.mark.long)])
def test_by_inductor(make_pair, check, name):
    original, fast = make_pair(name, dtype=torch.float32)
    compiled = torch.compile(fast, fullgraph=True, dynamic=True)
    inputs, real = batch_of([11, 5, 1, 8], 11)
    check(original, compiled, inputs, real, removed=True, rtol=1e-4, atol=1e-5)
    check(original, compiled, inputs, real, backward=True, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_reduce_overhead(make_pair, check):
    original, fast = make_pair(dtype=torch.float32)
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, mode="reduce-overhead")
    for lengths in ([11, 5, 1, 8], [3, 9, 4, 4]):
        inputs, real = batch_of(lengths, 11)
        check(original, compiled, inputs, real, removed=True, rtol=1e-4, atol=1e-5)


def test_autocast_in_a_compiled_model(make_pair, run, assert_rounds_alike):
    original, fast = make_pair(dtype=torch.float32, init={"add_pooling_layer": False})
    inputs, real = batch_of([11, 5, 1, 8], 11)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    found = []
    for model in (compiled, original):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(run(model, inputs, real)[0]["last_hidden_state"])
    exact, _ = run(copy.deepcopy(original).double(), inputs, real)
    assert found[0].dtype == found[1].dtype
    assert_rounds_alike(*found, exact["last_hidden_state"])


@pytest.mark.full
def test_the_reference_backend(make_pair, check):
    original, fast = make_pair(backend="reference")
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    inputs, real = batch_of([11, 5, 1, 8], 11)
    with backends.use("native"):
        check(original, compiled, inputs, real, backward=True)
        check(original, compiled, inputs, real, removed=True)


def test_an_optimised_model_within_a_compiled_function(make_pair):
    original, fast = make_pair("hf.BertForSequenceClassification")
    inputs, _ = batch_of([11, 5, 1, 8], 11)

    def loss(model):
        return model(**inputs, labels=torch.tensor([0, 1, 1, 0])).loss

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    compiled(fast).backward()
    loss(original).backward()
    for (name, expected), got in zip(original.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.full
@pytest.mark.parametrize("name", ["hf.BertModel", pytest.param("px.BertModel", marks=pytest.mark.long)])
def test_recording_in_a_compiled_model(make_pair, check, name):
    original, fast = make_pair(name)
    compiled = torch.compile(fast, backend="eager")
    inputs, real = batch_of([11, 5, 1, 8], 11)
    check(original, compiled, {**inputs, "output_hidden_states": True}, real)
    check(original, compiled, inputs, real)


@pytest.mark.full
def test_a_hook_in_a_compiled_model(make_pair, check):
    """Set before compiling: Dynamo looks for hooks only when it compiles, in any model."""
    original, fast = make_pair()
    seen = []
    query = fast.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    compiled = torch.compile(fast, backend="eager")
    inputs, real = batch_of([11, 5, 1, 8], 11)
    check(original, compiled, inputs, real)
    assert seen == [(4, 11, 32)]


def test_a_change_of_the_weights_after_compiling(make_pair, check):
    original, fast = make_pair()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    inputs, real = batch_of([11, 5, 1, 8], 11)
    for factor in (1.0, 1.1):
        for model in (original, fast):
            for parameter in model.parameters():
                parameter.data.mul_(factor)
        check(original, compiled, inputs, real)


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("name", MODELS)
def test_export_for_any_shape(make_pair, check, name, mask):
    original, fast = make_pair(name)
    inputs, _ = batch_of([11, 5, 1, 8], 11, mask)
    shape = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("seqlen", min=2, max=24)}
    program = torch.export.export(fast, (), inputs, dynamic_shapes=dict.fromkeys(inputs, shape))
    exported = program.module()
    for lengths, seqlen in BATCHES:
        inputs, real = batch_of(lengths, seqlen, mask)
        check(original, exported, inputs, real, removed=True if mask else None)
