"""Train an optimised classifier on many devices: by data, by shards of weights, by features and tokens, or by depth.

    torchrun --nproc-per-node 2 examples/train_distributed.py --parallel ddp|fsdp|tp|sp|pp
    python examples/train_distributed.py                        # the same steps in one process

Every way makes the same steps as one process does, on GPUs (NCCL) or without (gloo). With --save and --load
checkpoints are torch.distributed.checkpoint's: what two processes saved, one loads, and the other way round.
docs/scale.md says which way to take when.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import pytorch_ext
from pytorch_ext.models import BertConfig, BertForSequenceClassification
from pytorch_ext.training import PipelinePart, recompute, sequence_parallel, tensor_parallel

WAYS = ("one", "ddp", "fsdp", "tp", "sp", "pp")
BATCH, SEQLEN, CLASSES, VOCABULARY = 8, 24, 3, 96
MICROBATCHES = 2


def make_model(device: torch.device, dtype: torch.dtype, folder: Path | None) -> nn.Module:
    """A small BERT, or one from a checkpoint folder; the same weights in every process."""
    torch.manual_seed(0)
    if folder is not None:
        model = BertForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(
            vocab_size=VOCABULARY, max_position_embeddings=SEQLEN, num_labels=CLASSES, **sizes, **dropout
        )
        model = BertForSequenceClassification(config)
    return pytorch_ext.optimize(model.to(device, dtype).train())


def make_batch(step: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask ``(batch, seqlen)``, labels ``(batch,)``: alike in every process. The first token is the class."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(2, SEQLEN + 1, (BATCH,), generator=generator)
    ids = torch.randint(CLASSES, VOCABULARY, (BATCH, SEQLEN), generator=generator)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    ids[:, 0] = labels
    mask = (torch.arange(SEQLEN) < lengths[:, None]).long()
    return ids.to(device), mask.to(device), labels.to(device)


class Training:
    """One way to train: a step, its loss for the whole batch, and the weights under the whole model's names."""

    def __init__(self, way: str, model: nn.Module, device: torch.device) -> None:
        self.way, self.rank, self.world = way, dist.get_rank(), dist.get_world_size()
        self.schedule = None
        self.model = self._shared(model, device)
        # One by one: beside shared parameters stand others that every rank has whole.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3, eps=1e-3, foreach=False)

    def _shared(self, model: nn.Module, device: torch.device) -> nn.Module:
        if self.way == "ddp":
            return DistributedDataParallel(model)
        if self.way == "pp":
            part = PipelinePart(model, self.rank, self.world)
            stage = PipelineStage(part, self.rank, self.world, device)
            self.schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=F.cross_entropy)
            return part
        mesh = init_device_mesh(device.type, (self.world,))
        if self.way == "tp":
            return tensor_parallel(model, mesh)
        if self.way == "sp":
            return sequence_parallel(model, mesh)
        if self.way == "fsdp":
            for layer in model.bert.encoder.layer:
                fully_shard(layer, mesh=mesh)
            return fully_shard(model, mesh=mesh)
        return model

    def step(self, ids: Tensor, mask: Tensor, labels: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = (
            self._pipelined(ids, mask, labels) if self.schedule else self._forward_backward(ids, mask, labels)
        )
        self.optimizer.step()
        return loss

    def _forward_backward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> float:
        shared = self.way in ("ddp", "fsdp")
        part = slice(self.rank, None, self.world) if shared else slice(None)
        loss = self.model(ids[part], mask[part], labels=labels[part]).loss
        loss.backward()
        loss = loss.detach()
        if shared:
            dist.all_reduce(loss)
            loss /= self.world
        return loss.item()

    def _pipelined(self, ids: Tensor, mask: Tensor, labels: Tensor) -> float:
        losses: list[Tensor] = []
        last = self.rank == self.world - 1
        first = (ids,) if self.rank == 0 else ()
        told = {"target": labels, "losses": losses} if last else {}
        self.schedule.step(*first, attention_mask=mask, **told)
        loss = torch.stack(losses).mean() if last else ids.new_zeros((), dtype=torch.get_default_dtype())
        loss = loss.detach().to(next(self.model.parameters()).dtype)
        dist.broadcast(loss, src=self.world - 1)
        return loss.item()

    def state(self) -> dict[str, Tensor]:
        state = get_model_state_dict(self.model)
        return self.model.whole_names(state) if self.way == "pp" else state

    def save(self, folder: Path) -> None:
        dcp.save(self.state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        if self.way == "pp":
            names = self.model.whole_names({name: name for name in self.model.state_dict()})
            state = {own: state[whole] for whole, own in names.items()}
        set_model_state_dict(self.model, state)


def train(
    way: str, steps: int, device: torch.device, dtype: torch.dtype, options: argparse.Namespace
) -> list[float]:
    """The losses of ``steps`` steps."""
    model = recompute(make_model(device, dtype, options.model), options.recompute)
    training = Training(way, model, device)
    if options.load is not None:
        training.load(options.load)
    losses = [training.step(*make_batch(options.first + step, device)) for step in range(steps)]
    if options.save is not None:
        training.save(options.save)
    return losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parallel", choices=WAYS, default="one")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the number of the first batch")
    parser.add_argument("--model", type=Path, help="a BERT checkpoint folder [default: a small one]")
    parser.add_argument("--save", type=Path, metavar="FOLDER")
    parser.add_argument("--load", type=Path, metavar="FOLDER")
    parser.add_argument("--losses", type=Path, metavar="FILE", help="write the losses there, as JSON")
    parser.add_argument("--recompute", choices=("layers", "selective"), help="time for memory")
    parser.add_argument("--float64", action="store_true", help="compute in float64, to compare ways exactly")
    options = parser.parse_args(arguments)

    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29500")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 and options.parallel != "one":
        parser.error(f"--parallel {options.parallel} wants several processes: start this with torchrun")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    started = dist.is_initialized()  # by somebody who runs several ways in one go
    if not started:
        dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world)
    dtype = torch.float64 if options.float64 else torch.float32
    losses = train(options.parallel, options.steps, device, dtype, options)
    if rank == 0:
        print(f"{options.parallel}, {world} processes: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
        if options.losses is not None:
            options.losses.write_text(json.dumps(losses))
    if not started:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
