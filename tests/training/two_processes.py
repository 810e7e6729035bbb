"""Both of two processes that train an optimised model together in every way, under torchrun (``test_distributed.py``).

    torchrun --nproc-per-node 2 two_processes.py EXAMPLE FOLDER

``FOLDER/one`` is the checkpoint of one process. All in one start: importing torch takes longer than training.
"""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_ops import check_all
from torch.distributed.device_mesh import init_device_mesh


def main(example: Path, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("example", example)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def train(way: str, name: str, *more: object) -> None:
        told = ("--parallel", way, "--float64", "--losses", folder / f"{name}.json", *more)
        module.main([str(value) for value in told])

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for way in ("ddp", "fsdp", "tp", "sp", "pp"):
        train(way, way, "--save", folder / way)
    for way, what in (("ddp", "layers"), ("fsdp", "selective"), ("tp", "layers"), ("sp", "selective")):
        train(way, f"{way}-{what}", "--recompute", what, "--steps", 3)
    train("pp", "pp-after-tp", "--load", folder / "tp", "--first", 10, "--steps", 2)
    train("fsdp", "fsdp-after-one", "--load", folder / "one", "--first", 10, "--steps", 2)
    names = check_all(init_device_mesh("cpu", (2,)))
    if dist.get_rank() == 0:
        print("every op, with", *names)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
