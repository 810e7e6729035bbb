"""The rest of PyTorch around its Transformer: autocast, checkpointing, torch.func, sharding, compiling, export."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import pytorch_ext

N, S, E, H = 3, 7, 16, 4
REAL = "without padding: 13 of 21 positions were real tokens"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("mask", [False, True])
def test_autocast(make_encoder, make_tokens, assert_rounds_alike, dtype, mask):
    original = make_encoder(nested=False).float()
    fast = pytorch_ext.optimize(copy.deepcopy(original))
    exact = make_encoder(nested=False)
    exact.load_state_dict(original.state_dict())
    x, padding = make_tokens()
    masks = {"src_key_padding_mask": padding}
    if mask:
        masks["mask"] = torch.randn(S, S, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype), pytest.warns() if mask else torch.enable_grad():
        expected, got = (m.train()(x.float(), **masks)[~padding] for m in (original, fast))
        got.sum().backward()
    assert got.dtype == expected.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in fast.parameters())
    exact_masks = {n: t.double() if t.is_floating_point() else t for n, t in masks.items()}
    with pytest.warns() if mask else torch.enable_grad():
        truth = exact.train()(x.float().double(), **exact_masks)[~padding]
    assert_rounds_alike(got.to(dtype), expected.to(dtype), truth)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(pair, make_tokens, assert_alike, last_forward, reentrant):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

    original, fast = pair
    kind = wrappers.CheckpointImpl.REENTRANT if reentrant else wrappers.CheckpointImpl.NO_REENTRANT
    wrappers.apply_activation_checkpointing(
        fast,
        checkpoint_wrapper_fn=lambda m: wrappers.checkpoint_wrapper(m, checkpoint_impl=kind),
        check_fn=lambda m: isinstance(m, nn.TransformerEncoderLayer),
    )
    x, padding = make_tokens()
    assert_alike(original, fast, x, padding)
    assert last_forward(fast) == REAL
    learned = torch.randn(S, S, dtype=torch.float64, requires_grad=True)
    gradients = []
    for model in pair:
        model.train()(x.clone().requires_grad_(), learned).sin().sum().backward()
        gradients.append(learned.grad)
        learned.grad = None
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop because")
def test_functional_call_and_transforms(pair, make_tokens):
    x, padding = make_tokens()
    parameters = {name: p.detach() * 1.1 for name, p in pair[0].named_parameters()}

    def loss(model):
        def of(parameters, x, padding):
            out = torch.func.functional_call(model, parameters, (x,), {"src_key_padding_mask": padding})
            return (out.sin() * ~padding[..., None]).sum()

        return of

    expected, got = (torch.func.grad(loss(m.train()))(parameters, x, padding) for m in pair)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    each = [
        torch.func.vmap(torch.func.grad(loss(m)), (None, 0, 0))(parameters, x[:, None], padding[:, None])
        for m in pair
    ]
    torch.testing.assert_close(each[1], each[0], rtol=1e-9, atol=1e-10)


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo")
def test_fully_shard(pair, make_tokens, last_forward, tmp_path):
    """The layers shard by themselves; what gathers them again does not keep the padding."""
    from torch.distributed.fsdp import fully_shard

    _, fast = pair
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for layer in fast.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(fast, mesh=mesh)
        x, padding = make_tokens()
        for _ in range(2):
            outs = [model.train()(x, src_key_padding_mask=padding)[~padding] for model in pair]
            torch.testing.assert_close(outs[1], outs[0], rtol=1e-8, atol=1e-9)
            assert last_forward(fast) == REAL
            for model, out in zip(pair, outs, strict=True):
                out.sin().sum().backward()
                torch.optim.SGD(model.parameters(), lr=0.1).step()
                model.zero_grad()
    finally:
        dist.destroy_process_group()


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BATCHES = (((7, 2, 4), 7), ((5, 3), 5), ((9, 1, 1, 2), 9))


@pytest.mark.parametrize(
    ("batch_first", "padded", "causal"),
    [
        (True, True, False),
        pytest.param(False, False, True, marks=pytest.mark.full),
        pytest.param(True, False, False, marks=pytest.mark.long),
        pytest.param(False, True, False, marks=pytest.mark.long),
        pytest.param(True, True, True, marks=pytest.mark.full),
    ],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:Support for mismatched")
def test_a_full_graph_for_any_shape(fresh_dynamo, make_encoder, make_tokens, batch_first, padded, causal):
    """One graph serves all batches, and leaves the padding out of all."""
    original = make_encoder(layers=1, batch_first=batch_first)
    fast = pytorch_ext.optimize(copy.deepcopy(original))
    counter, compilations = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend=counter)
    for lengths, seqlen in BATCHES:
        x, padding = make_tokens(lengths, seqlen)
        masks = {"src_key_padding_mask": padding} if padded else {}
        if causal:
            masks["mask"] = nn.Transformer.generate_square_subsequent_mask(seqlen, dtype=torch.float64)
            masks["is_causal"] = True
        results = []
        for model in (original.train(), compiled.train()):
            model.zero_grad()
            leaf = (x if batch_first else x.transpose(0, 1)).clone().requires_grad_()
            out = model(leaf, **masks)
            out = out if batch_first else out.transpose(0, 1)
            real = out[~padding] if padded else out
            real.sin().sum().backward()
            results.append([real, leaf.grad, *(p.grad for p in model.parameters())])
        for got, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
        if padded and not causal:
            assert not out[padding].any()
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


@pytest.mark.full
@pytest.mark.parametrize("padded", [True, False])
def test_inductor(fresh_dynamo, pair, make_tokens, padded):
    original, fast = (model.train() for model in pair)
    x, padding = make_tokens()
    masks = {"src_key_padding_mask": padding} if padded else {}
    real = ~padding if padded else torch.ones_like(padding)
    expected, got = original(x, **masks)[real], torch.compile(fast, fullgraph=True)(x, **masks)[real]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_plain_compile_breaks_at_the_gather_alone(fresh_dynamo, pair, make_tokens):
    original, fast = (model.train() for model in pair)
    x, padding = make_tokens()
    compiled = torch.compile(fast, backend="eager")
    expected, got = (model(x, src_key_padding_mask=padding)[~padding] for model in (original, compiled))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("padded", [True, False])
def test_export(pair, make_tokens, padded):
    original, fast = (model.train() for model in pair)
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("seqlen", min=2)}
    x, padding = make_tokens()
    masks = {"src_key_padding_mask": padding} if padded else {}
    shapes = {"src": sizes, **dict.fromkeys(masks, sizes)}
    program = torch.export.export(fast, (x,), masks, dynamic_shapes=shapes)
    x, padding = make_tokens((5, 1, 2, 3), 5)
    masks, real = ({"src_key_padding_mask": padding}, ~padding) if padded else ({}, torch.ones_like(padding))
    got, expected = program.module()(x, **masks)[real], original(x, **masks)[real]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
