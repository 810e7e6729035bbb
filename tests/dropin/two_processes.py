"""One of two processes that train an optimised model together: run by ``test_two_processes.py``.

Each holds an untouched model beside it, which learns from both batches at once. After every step the two must be alike.
"""

import copy
import sys
import warnings
from collections.abc import Callable

import accelerate
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import pytorch_ext
from pytorch_ext.testing import padding_mask

LENGTHS = [[11, 5, 1, 8], [3, 11, 11, 6]]  # in the two processes
STEPS = 3


def main(store: str, rank: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".*returned a view")
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    for way in (DistributedDataParallel, sharded, accelerated):
        train(way, rank)
        print(f"{way.__name__}: {STEPS} steps")
    by_sequence()
    dist.destroy_process_group()


def train(way: Callable[[nn.Module], nn.Module], rank: int) -> None:
    original, batches = make_model(), [make_batch(lengths) for lengths in LENGTHS]
    fast = pytorch_ext.optimize(copy.deepcopy(original))
    trained = way(fast)
    optimisers = [
        torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3, fused=True) for m in (original, trained)
    ]
    for step in range(STEPS):
        for optimiser in optimisers:
            optimiser.zero_grad()
        (sum(original(**batch).loss for batch in batches) / 2).backward()
        trained(**batches[rank]).loss.backward()
        for (name, parameter), other in zip(original.named_parameters(), trained.parameters(), strict=True):
            close(whole(other.grad), parameter.grad, f"{way.__name__}, step {step}, gradient of {name}")
        for optimiser in optimisers:
            optimiser.step()
        with torch.no_grad():  # from weights that are laid out, and have changed
            got, expected = trained(**batches[rank]), original(**batches[rank])
        close(got.logits, expected.logits, f"{way.__name__}, step {step}, logits")
    last = [line for line in pytorch_ext.explain(fast).padding if "last forward" in line]
    assert "without padding" in last[0], last


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config).double()


def make_batch(lengths: list[int]) -> dict[str, torch.Tensor]:
    real = padding_mask(lengths, 11)
    ids = torch.randint(1, 61, real.shape, generator=torch.Generator().manual_seed(lengths[0]))
    return {"input_ids": ids, "attention_mask": real.long(), "labels": torch.tensor([0, 1, 1, 0])}


def sharded(model: nn.Module) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def accelerated(model: nn.Module) -> nn.Module:
    return accelerate.Accelerator(cpu=True).prepare(model)


def by_sequence() -> None:
    """PyTorch's own plan for sequence parallelism, on an optimised model as on an untouched one."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    original = make_model()
    fast = pytorch_ext.optimize(copy.deepcopy(original))
    scattered = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
    plan = {
        "attention.self": PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
        ),
        **{f"attention.self.{name}": ColwiseParallel() for name in ("query", "key", "value")},
        "attention.output.dense": scattered,
        "attention.output.LayerNorm": SequenceParallel(),
        "intermediate.dense": ColwiseParallel(input_layouts=Shard(1)),
        "output.dense": scattered,
        "output.LayerNorm": SequenceParallel(),
    }
    for layer in fast.bert.encoder.layer:
        parallelize_module(layer, mesh, plan)
    ends = PrepareModuleOutput(
        output_layouts=Replicate(), desired_output_layouts=Shard(1), use_local_output=False
    )
    parallelize_module(fast.bert.embeddings, mesh, ends)
    ends = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
    parallelize_module(fast.bert.encoder.layer[-1].output.LayerNorm, mesh, ends)
    batch = {name: x[:, :10] if x.dim() == 2 else x for name, x in make_batch(LENGTHS[0]).items()}
    expected, got = original(**batch), fast(**batch)
    close(got.logits, expected.logits, "by sequence, logits")
    expected.loss.backward()
    got.loss.backward()
    for (name, parameter), other in zip(original.named_parameters(), fast.parameters(), strict=True):
        close(whole(other.grad), parameter.grad, f"by sequence, gradient of {name}")
    last = [line for line in pytorch_ext.explain(fast).padding if "last forward" in line]
    assert "dense: the batch is shared out over devices already" in last[0], last


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def close(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9, msg=lambda m: f"{what}: {m}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
