"""With which tiles, warps and stages the attention kernels run."""

from ._attention_backward_keys import _attention_bwd_keys_kernel
from ._attention_backward_queries import _attention_bwd_queries_kernel
from ._attention_forward import _attention_fwd_kernel
from .configs import Configs

# Keys of one tile, and what they may take in shared memory: 256 keys of a head of 64 in 16 bits.
MOST_KEYS_AT_ONCE = 256
MOST_BYTES_AT_ONCE = 32 * 1024


def at_once(keys: int, head_dim: int, itemsize: int) -> bool:
    """Whether one tile holds all keys of a sequence (sizes are powers of two)."""
    return keys <= MOST_KEYS_AT_ONCE and keys * head_dim * itemsize <= MOST_BYTES_AT_ONCE


_ALL = ("sm_80", "sm_90", "sm_100")

FORWARD_AT_ONCE = Configs(
    "attention_fwd_at_once",
    by=("head_dim", "keys", "itemsize"),
    table={a: [((None, None, None), {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1})] for a in _ALL},
    wider={"BLOCK_M": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1,)},
    kernels=lambda: [_attention_fwd_kernel],
)
FORWARD = Configs(
    "attention_fwd",
    by=("head_dim", "itemsize"),
    table=dict.fromkeys(
        _ALL, [((None, None), {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2})]
    ),
    wider={
        "BLOCK_M": (64, 128),
        "BLOCK_N": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    kernels=lambda: [_attention_fwd_kernel],
)
BACKWARD_AT_ONCE = Configs(
    "attention_bwd_at_once",
    by=("head_dim", "keys", "itemsize"),
    table=dict.fromkeys(_ALL, [((None, None, None), {"BLOCK_M": 64, "num_warps": 8, "num_stages": 1})]),
    wider={"BLOCK_M": (16, 32, 64), "num_warps": (4, 8, 16), "num_stages": (1, 2)},
    kernels=lambda: [_attention_bwd_keys_kernel],
)
BACKWARD_KEYS = Configs(
    "attention_bwd_keys",
    by=("head_dim", "itemsize"),
    table=dict.fromkeys(
        _ALL, [((None, None), {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1})]
    ),
    wider={
        "BLOCK_M": (32, 64),
        "BLOCK_N": (64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    kernels=lambda: [_attention_bwd_keys_kernel],
)
BACKWARD_QUERIES = Configs(
    "attention_bwd_queries",
    by=("head_dim", "itemsize"),
    table=dict.fromkeys(
        _ALL, [((None, None), {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1})]
    ),
    wider={
        "BLOCK_M": (64, 128),
        "BLOCK_N": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    kernels=lambda: [_attention_bwd_queries_kernel],
)
