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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def close(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9, msg=lambda m: f"{what}: {m}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
