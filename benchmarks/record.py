"""What a measured number means nothing without: the machine, the versions, the commit, how it was timed."""

from __future__ import annotations

import contextlib
import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pytorch_ext.backends import cpu

from .timing import HOW_TIMED


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Device, processor, threads, versions, commit, date and method, ready for JSON."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "device_type": device.type,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels_isa": cpu.isa(),  # of ours, while PyTorch has its own
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name) for name in ("torch", "transformers", "pytorch-ext", "triton", "openvino")
            },
            "cuda": torch.version.cuda if on_gpu else None,
        },
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "how_timed": HOW_TIMED,
    }


def version(distribution: str) -> str | None:
    """The installed version; torch says more about itself (``+cpu``) than its metadata."""
    if distribution == "torch":
        return torch.__version__
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout this file lies in (``+changes`` if it has any), or None outside one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def sdpa_backend(
    batch: int,
    heads: int,
    length: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    masked: bool,
) -> str:
    """Which of its kernels ``scaled_dot_product_attention`` takes for such tensors, as PyTorch names it."""
    query = torch.empty(batch, length, heads, head_dim, dtype=dtype, device=device).transpose(1, 2)
    mask = torch.empty(batch, 1, length, length, dtype=torch.bool, device=device) if masked else None
    try:
        return torch.nn.attention.SDPBackend(torch._fused_sdp_choice(query, query, query, mask)).name.lower()
    except (AttributeError, RuntimeError, ValueError):
        return "unknown"
