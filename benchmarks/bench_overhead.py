"""What a call of our functions costs the host, in microseconds, above PyTorch's own function or composition.

    python -m benchmarks.bench_overhead
    python -m benchmarks.bench_overhead --backend native --threads 1 --check

The tensors are tiny, so that computing takes next to nothing and what remains is the way to the kernel. The rule:
at most 4 us over the native function without gradients, 10 us per direction with them. Blocks of calls of both take
turns; the figures are medians over the blocks. In the backward pass one graph is walked again and again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import pytorch_ext
from pytorch_ext import ops

from . import record, timing
from .console import Progress, in_red, table

LIMIT_US = {"no grad": 4.0, "forward": 10.0, "backward": 10.0}
TOKENS, HIDDEN, HEADS, SEQUENCES = 8, 32, 2, 2
Function = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One op: the native way and ours, closures over the same tensors, of which `leaves` may get gradients."""

    name: str
    native: Function
    ours: Function
    leaves: Sequence[torch.Tensor]

    @property
    def op(self) -> str:
        """As in pytorch_ext.ops."""
        return self.name.partition(",")[0]


@dataclass(frozen=True)
class Line:
    """The result for one op in one mode."""

    op: str
    mode: str
    native_us: float
    ours_us: float
    over_us: float  # the median over the blocks of ours - native

    @property
    def ok(self) -> bool:
        return self.over_us <= LIMIT_US[self.mode]


def cases(device: str) -> list[Case]:
    """Each public op on tiny tensors, beside what PyTorch has for it."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(device)

    x, residual, scale, shift, bias = (
        random(TOKENS, HIDDEN),
        random(TOKENS, HIDDEN),
        *(random(HIDDEN) for _ in "123"),
    )
    matrix = random(HIDDEN, HIDDEN)
    q, k, v = (random(1, HEADS, TOKENS, HIDDEN // HEADS) for _ in "qkv")
    packed = [random(TOKENS, HEADS, HIDDEN // HEADS) for _ in "qkv"]
    each = TOKENS // SEQUENCES
    bounds = torch.arange(0, TOKENS + 1, each, dtype=torch.int32, device=device)
    ids = torch.randint(0, 10, (SEQUENCES, each), generator=draw).to(device)
    types, positions = ids % 2, torch.arange(each, device=device).expand(SEQUENCES, each).contiguous()
    word, place, segment = random(10, HIDDEN), random(each, HIDDEN), random(2, HIDDEN)

    def varlen_composed() -> torch.Tensor:
        parts = [
            F.scaled_dot_product_attention(*(t[at : at + each].transpose(0, 1).unsqueeze(0) for t in packed))
            for at in range(0, TOKENS, each)
        ]
        return torch.cat([part.squeeze(0).transpose(0, 1) for part in parts])

    def embedding_composed() -> torch.Tensor:
        total = F.embedding(ids, word) + F.embedding(positions, place) + F.embedding(types, segment)
        return F.layer_norm(total, (HIDDEN,), scale, shift, 1e-12)

    return [
        Case(
            "layer_norm",
            lambda: F.layer_norm(x, (HIDDEN,), scale, shift),
            lambda: ops.layer_norm(x, (HIDDEN,), scale, shift),
            [x, scale, shift],
        ),
        Case("gelu", lambda: F.gelu(x), lambda: ops.gelu(x), [x]),
        Case("bias_gelu", lambda: F.gelu(x + bias), lambda: ops.bias_gelu(x, bias), [x, bias]),
        Case(
            "linear",
            lambda: F.linear(x, matrix, bias),
            lambda: ops.linear(x, matrix, bias),
            [x, matrix, bias],
        ),
        Case(
            "linear, gelu",
            lambda: F.gelu(F.linear(x, matrix, bias)),
            lambda: ops.linear(x, matrix, bias, "gelu"),
            [x, matrix, bias],
        ),
        Case(
            "dropout_add_layer_norm",
            lambda: F.layer_norm(residual + F.dropout(x + bias, 0.0), (HIDDEN,), scale, shift),
            lambda: ops.dropout_add_layer_norm(x, residual, scale, shift, input_bias=bias),
            [x, residual, scale, shift, bias],
        ),
        Case(
            "scaled_dot_product_attention",
            lambda: F.scaled_dot_product_attention(q, k, v),
            lambda: ops.scaled_dot_product_attention(q, k, v),
            [q, k, v],
        ),
        Case(
            "varlen_attention",
            varlen_composed,
            lambda: ops.varlen_attention(*packed, bounds, bounds, each, each),
            packed,
        ),
        Case(
            "embedding_layer_norm",
            embedding_composed,
            lambda: ops.embedding_layer_norm(
                ids, types, positions, word, place, segment, scale, shift, eps=1e-12
            ),
            [word, place, segment, scale, shift],
        ),
    ]


def check(case: Case) -> timing.Agreement:
    """Ours against the native way, output and gradients; tiny sums leave no room for more than rounding."""
    got, want = (_with_gradients(function, case.leaves) for function in (case.ours, case.native))
    limits = {name: 1e-5 * max(1.0, tensor.abs().max().item()) for name, tensor in want.items()}
    return timing.compare(got, want, limits, rows=False)


def _with_gradients(function: Function, leaves: Sequence[torch.Tensor]) -> dict[Any, torch.Tensor]:
    with _gradients(leaves):
        out = function()
        # Not a plain sum: its gradient through a layer norm is zero.
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        grads = torch.autograd.grad(out, leaves, weights)
    return {"output": out.detach(), **dict(enumerate(grads))}


@contextlib.contextmanager
def _gradients(leaves: Sequence[torch.Tensor]) -> Any:
    for leaf in leaves:
        leaf.requires_grad_(True)
    try:
        yield
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)


Measured = tuple[Line, timing.Timings]  # a line, and the seconds of each block


def measure(case: Case, calls: int, blocks: int, device: str) -> list[Measured]:
    """Both ways in each mode, in blocks of `calls`."""
    both = {"native": case.native, "ours": case.ours}
    with torch.no_grad():
        lines = [_line(case.name, "no grad", both, calls, blocks, device)]
    with _gradients(case.leaves):
        lines.append(_line(case.name, "forward", both, calls, blocks, device))
        walks = {name: _walk(function(), case.leaves) for name, function in both.items()}
        lines.append(_line(case.name, "backward", walks, calls, blocks, device))
    return lines


def _walk(out: torch.Tensor, leaves: Sequence[torch.Tensor]) -> Function:
    upstream = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def _line(op: str, mode: str, both: dict[str, Function], calls: int, blocks: int, device: str) -> Measured:
    def repeat(function: Function) -> Callable[[object], None]:
        def block(_: object) -> None:
            for _ in range(calls):
                function()

        return block

    contenders = {name: repeat(function) for name, function in both.items()}
    taken = timing.interleave(contenders, rounds=blocks, warmup=2, device=device)
    native, ours = ([seconds / calls * 1e6 for seconds in taken.seconds[name]] for name in ("native", "ours"))
    over = statistics.median(b - a for a, b in zip(native, ours, strict=True))
    return Line(op, mode, statistics.median(native), statistics.median(ours), over), taken


def as_text(lines: list[Line], backend: str) -> str:
    """The table."""
    header = ["op", "mode", "native us", f"ours us ({backend})", "over us", "at most"]
    body = []
    for line in lines:
        figures = (line.native_us, line.ours_us)
        limit = f"{LIMIT_US[line.mode]:.0f}{'' if line.ok else '  OVER'}"
        body.append([line.op, line.mode, *(f"{us:.1f}" for us in figures), f"{line.over_us:+.1f}", limit])
    red = frozenset(place for place, line in enumerate(lines) if not line.ok)
    return table(header, body, red)


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 when an op disagrees, or with --check when one is over its limit."""
    parser = argparse.ArgumentParser(prog="bench_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="native", help="ours runs on this one [%(default)s]")
    parser.add_argument("--ops", help="a comma-separated list; all by default")
    parser.add_argument("--calls", type=int, default=200, help="calls in a block [%(default)s]")
    parser.add_argument("--blocks", type=int, default=31, help="blocks per way [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="more would only add noise [%(default)s]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--check", action="store_true", help="fail when an op is over its limit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    options = parser.parse_args(argv)
    if min(options.calls, options.blocks, options.threads) < 1:
        parser.error("--calls, --blocks and --threads must be at least 1")
    if options.backend not in pytorch_ext.backends.available():
        parser.error(f"no such backend here: {options.backend}")
    chosen = cases(options.device)
    if options.ops:
        wanted = options.ops.split(",")
        if unknown := set(wanted) - {case.name for case in chosen}:
            parser.error(f"no such op: {', '.join(sorted(unknown))}")
        chosen = [case for case in chosen if case.name in wanted]

    torch.set_num_threads(options.threads)
    lines: list[Line] = []
    red: list[str] = []
    progress = Progress()
    with pytorch_ext.backends.use(options.backend):
        for case in chosen:
            progress.start(case.name)
            found = check(case)
            if found.ok:
                lines += [line for line, _ in measure(case, options.calls, options.blocks, options.device)]
            else:
                red.append(f"{case.name}: {found}; no time is shown")
    progress.done()
    if lines:
        print(as_text(lines, options.backend))
    for sentence in red:
        print(in_red(sentence))
    if options.json is not None:
        result = {
            "benchmark": "bench_overhead",
            "environment": record.environment(options.device),
            "backend": options.backend,
            "shapes": {"tokens": TOKENS, "hidden": HIDDEN, "heads": HEADS, "sequences": SEQUENCES},
            "dtype": "fp32",
            "calls": options.calls,
            "blocks": options.blocks,
            "limits_us": LIMIT_US,
            "lines": [{**asdict(line), "ok": line.ok} for line in lines],
            "disagree": red,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if red or (options.check and not all(line.ok for line in lines)) else 0


if __name__ == "__main__":
    sys.exit(main())
