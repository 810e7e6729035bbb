"""Peers of single ops beside eager PyTorch and torch.compile: run where they are asked for, as they take long."""

from __future__ import annotations

import importlib.util

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .op_bench import Case, Contender, Function

AUTOTUNED = "max-autotune-no-cudagraphs"  # what a graph saves is timed apart, and alike for everyone
SDPA = {
    "cpu": (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION),
    "cuda": (
        SDPBackend.MATH,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    ),
}


def peers(case: Case, device: str) -> list[Contender]:
    """Tuned compilation, SDPA's kernels one by one where the op is attention, and Liger's where it has one."""
    if case.op == "varlen_attention":
        return []  # eager is a loop there, which no tuning and no kernel mends
    found = [_of(case, "max-autotune", lambda f: torch.compile(f, dynamic=False, mode=AUTOTUNED))]
    for kernel in SDPA[device] if case.sdpa else ():
        name = kernel.name.removesuffix("_ATTENTION").lower()
        found.append(_of(case, f"sdpa-{name}", lambda f, kernel=kernel: _forced(f, kernel)))
    if case.op == "layer_norm":
        found.append(_liger(device))
    return found


def _of(case: Case, name: str, changed) -> Contender:
    timed = case.eager if case.training is None else case.training[1]
    compared = changed(case.eager)
    return Contender(name, compared, compared if timed is case.eager else changed(timed))


def _forced(function: Function, kernel: SDPBackend) -> Function:
    def call(**tensors: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([kernel]):
            return function(**tensors)

    return call


def _liger(device: str) -> Contender:
    def layer_norm(input, weight, bias) -> torch.Tensor:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return LigerLayerNormFunction.apply(input, weight, bias, 1e-12)

    found = Contender("liger", layer_norm, layer_norm)
    if device != "cuda":
        found.note = "its kernels are for a GPU alone"
    elif importlib.util.find_spec("liger_kernel") is None:
        found.note = "liger_kernel is not installed"
    return found
