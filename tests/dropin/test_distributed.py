"""DistributedDataParallel and fully_shard, each with one process; with two: the tests that start processes."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import pytorch_ext
from pytorch_ext.dropin._padding import Packed

MODELS = ["hf.BertModel", "px.BertModel"]

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"
)


@pytest.fixture(autouse=True)
def process_group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("kind", ["right", "left", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_data_parallel(make_pair, make_batch, assert_same, run, name, kind):
    original, fast = make_pair(name)
    batch = make_batch(kind)
    parallel = DistributedDataParallel(fast)
    for model in (original, parallel):
        run(model, batch.inputs, batch.real, backward=True)
    for (parameter, expected), got in zip(original.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-9, atol=1e-11, msg=parameter)
    for model in (original, fast):
        torch.optim.AdamW(model.parameters(), fused=True, eps=1e-3).step()
    assert_same(original, fast, batch, rtol=1e-7, atol=1e-8)
    pytorch_ext.revert(parallel)
    assert_same(original, fast, batch, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", MODELS)
def test_fully_shard(make_model, make_batch, run, name, when):
    original, fast = make_model(name), make_model(name)
    if when == "before":
        pytorch_ext.optimize(fast)
    for layer in fast.encoder.layer:
        fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    fully_shard(fast, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    if when == "after":
        pytorch_ext.optimize(fast)
    batch = make_batch()
    for _ in range(2):
        expected, expected_gradients = run(original, batch.inputs, batch.real, backward=True)
        got, gradients = run(fast, batch.inputs, batch.real, backward=True)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        for parameter, gradient in expected_gradients.items():
            torch.testing.assert_close(
                whole(gradients[parameter]), gradient, rtol=1e-9, atol=1e-11, msg=parameter
            )
        for model in (original, fast):
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        expected, _ = run(original, batch.inputs, batch.real)
        got, _ = run(fast, batch.inputs, batch.real)
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)

    kinds = {n: type(m) for n, m in fast.named_modules()}
    assert kinds["encoder.layer.0"].__name__.startswith("FSDP")
    if when == "before":
        with pytest.raises(
            RuntimeError, match=r"expected the classes that optimize set, got others in .*FSDP"
        ):
            pytorch_ext.revert(fast)
        assert {n: type(m) for n, m in fast.named_modules()} == kinds
    else:  # the layers had classes of their own already, and were left alone
        pytorch_ext.revert(fast)
    run(fast, batch.inputs, batch.real, backward=True)


@pytest.mark.parametrize("name", MODELS)
def test_sharded_layers_get_tokens_without_padding(make_pair, make_batch, monkeypatch, name, recwarn):
    _, fast = make_pair(name)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in fast.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(fast, mesh=mesh)
    padded = []
    original = Packed.pad
    monkeypatch.setattr(Packed, "pad", lambda self, x: padded.append(x.shape) or original(self, x))
    fast(**make_batch().inputs).last_hidden_state.sum().backward()
    assert padded == [(25, 32)], "once, after the last layer"
    assert not [w for w in recwarn if "returned a view" in str(w.message)]


def test_fully_shard_in_mixed_precision(make_pair, make_batch, run):
    original, fast = make_pair(dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in fast.encoder.layer:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(fast, mesh=mesh, mp_policy=policy)
    batch = make_batch()
    expected, _ = run(original, batch.inputs, batch.real)
    for backward in (True, False):
        got, _ = run(fast, batch.inputs, batch.real, backward=backward)
        torch.testing.assert_close(
            got["last_hidden_state"].float(), expected["last_hidden_state"], rtol=0.1, atol=0.1
        )
