"""With which tiles, warps and stages the attention kernels run.

What is in the tables was compiled and not measured: among tiles that published kernels use, those that leave no
register of a forward kernel in memory, and few of a backward kernel, with dropout and with causal masks. Dropout takes
many registers, so it has rows of its own.
"""

from ._attention_backward_keys import _attention_bwd_keys_kernel
from ._attention_backward_queries import _attention_bwd_queries_kernel
from ._attention_forward import _attention_fwd_kernel
from .configs import Configs

# One tile holds all keys of a sequence up to so many, and so many bytes of them: forward 256 of a head of 64 in 16
# bits. Backward, where their gradients are in registers besides, half as much.
MOST_KEYS = 256
MOST_BYTES = 32 * 1024


def at_once(keys: int, head_dim: int, itemsize: int, backward: bool) -> bool:
    """Whether one tile holds all keys of a sequence (sizes are powers of two)."""
    share = 2 if backward else 1
    return keys <= MOST_KEYS // share and keys * head_dim * itemsize <= MOST_BYTES // share


def _tiles(block_m: int, num_warps: int, num_stages: int = 1, block_n: int = 0) -> dict[str, int]:
    tiles = {"BLOCK_M": block_m, "num_warps": num_warps, "num_stages": num_stages}
    return {**tiles, "BLOCK_N": block_n} if block_n else tiles


# float32 is multiplied without tensor cores, element by element: small tiles.
_FLOAT32_AT_ONCE = ((None, None, None, None), _tiles(16, 4))
_FLOAT32_AT_ONCE_BACKWARD = ((None, None, None, None), _tiles(16, 8))
_FLOAT32 = ((None, None, None), _tiles(16, 4, 1, 32))
_FLOAT32_BACKWARD = ((None, None, None), _tiles(16, 8, 1, 32))

FORWARD_AT_ONCE = Configs(
    "attention_fwd_at_once",
    by=("head_dim", "keys", "itemsize", "drops"),
    table={
        "sm_80": [
            ((64, 128, 2, None), _tiles(64, 4)),
            ((128, 128, 2, None), _tiles(64, 8)),
            ((None, None, 2, None), _tiles(32, 4)),
            _FLOAT32_AT_ONCE,
        ],
        "sm_90": [
            ((64, 128, 2, None), _tiles(64, 4)),
            ((128, 128, 2, None), _tiles(64, 8)),
            ((64, 256, 2, 0), _tiles(64, 8)),
            ((None, None, 2, None), _tiles(32, 4)),
            _FLOAT32_AT_ONCE,
        ],
        "sm_100": [
            ((64, 128, 2, None), _tiles(64, 4)),
            ((128, 128, 2, None), _tiles(64, 8)),
            ((64, 256, 2, 0), _tiles(64, 8)),
            ((None, None, 2, None), _tiles(32, 4)),
            _FLOAT32_AT_ONCE,
        ],
    },
    wider={"BLOCK_M": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1,)},
    kernels=lambda: [_attention_fwd_kernel],
    fits=lambda constants, sizes: _fits(constants["BLOCK_M"], sizes[1], sizes[0], sizes[2]),
)
FORWARD = Configs(
    "attention_fwd",
    by=("head_dim", "itemsize", "drops"),
    table={
        "sm_80": [
            ((64, 2, None), _tiles(128, 8, 3, 64)),
            ((128, 2, None), _tiles(64, 8, 2, 32)),
            ((None, 2, None), _tiles(64, 8, 1, 32)),
            _FLOAT32,
        ],
        "sm_90": [
            ((64, 2, 0), _tiles(128, 8, 2, 128)),
            ((64, 2, None), _tiles(128, 8, 3, 64)),
            ((128, 2, None), _tiles(128, 8, 2, 64)),
            ((None, 2, None), _tiles(64, 8, 1, 32)),
            _FLOAT32,
        ],
        "sm_100": [
            ((64, 2, None), _tiles(128, 8, 3, 64)),
            ((128, 2, None), _tiles(128, 8, 2, 64)),
            ((None, 2, None), _tiles(64, 8, 1, 64)),
            _FLOAT32,
        ],
    },
    wider={
        "BLOCK_M": (16, 32, 64, 128),
        "BLOCK_N": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    kernels=lambda: [_attention_fwd_kernel],
    fits=lambda constants, sizes: _fits(constants["BLOCK_M"], constants["BLOCK_N"], sizes[0], sizes[1]),
)
BACKWARD_AT_ONCE = Configs(
    "attention_bwd_at_once",
    by=("head_dim", "keys", "itemsize", "drops"),
    table={
        a: [
            ((64, 64, 2, None), _tiles(32, 4)),
            ((None, None, 2, None), _tiles(32, 8)),
            _FLOAT32_AT_ONCE_BACKWARD,
        ]
        for a in ("sm_80", "sm_90", "sm_100")
    },
    wider={"BLOCK_M": (16, 32, 64), "num_warps": (4, 8), "num_stages": (1, 2)},
    kernels=lambda: [_attention_bwd_keys_kernel],
    fits=lambda constants, sizes: _fits(constants["BLOCK_M"], sizes[1], sizes[0], sizes[2]),
)
BACKWARD_KEYS = Configs(
    "attention_bwd_keys",
    by=("head_dim", "itemsize", "drops"),
    table={
        "sm_80": [
            ((64, 2, None), _tiles(32, 8, 2, 128)),
            ((128, 2, None), _tiles(32, 8, 1, 64)),
            ((None, 2, None), _tiles(16, 8, 1, 32)),
            _FLOAT32_BACKWARD,
        ],
        "sm_90": [
            ((64, 2, 0), _tiles(64, 8, 1, 128)),
            ((64, 2, None), _tiles(32, 8, 2, 128)),
            ((128, 2, None), _tiles(32, 8, 1, 64)),
            ((None, 2, None), _tiles(32, 8, 1, 64)),
            _FLOAT32_BACKWARD,
        ],
        "sm_100": [
            ((64, 2, None), _tiles(64, 8, 1, 128)),
            ((128, 2, None), _tiles(64, 8, 1, 64)),
            ((None, 2, None), _tiles(32, 8, 1, 64)),
            _FLOAT32_BACKWARD,
        ],
    },
    wider={"BLOCK_M": (16, 32, 64), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2)},
    kernels=lambda: [_attention_bwd_keys_kernel],
    fits=lambda constants, sizes: _fits(constants["BLOCK_M"], constants["BLOCK_N"], sizes[0], sizes[1]),
)
BACKWARD_QUERIES = Configs(
    "attention_bwd_queries",
    by=("head_dim", "itemsize", "drops"),
    table={
        "sm_80": [
            ((64, 2, 0), _tiles(128, 8, 2, 64)),
            ((64, 2, None), _tiles(64, 8, 2, 32)),
            ((128, 2, None), _tiles(64, 8, 1, 32)),
            ((None, 2, None), _tiles(32, 8, 1, 32)),
            _FLOAT32,
        ],
        "sm_90": [
            ((64, 2, None), _tiles(128, 8, 2, 64)),
            ((128, 2, None), _tiles(64, 8, 1, 64)),
            ((None, 2, None), _tiles(32, 8, 1, 32)),
            _FLOAT32,
        ],
        "sm_100": [
            ((64, 2, None), _tiles(128, 8, 2, 64)),
            ((128, 2, None), _tiles(64, 8, 1, 64)),
            ((None, 2, None), _tiles(64, 8, 1, 32)),
            _FLOAT32,
        ],
    },
    wider={"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (32, 64), "num_warps": (4, 8), "num_stages": (1, 2)},
    kernels=lambda: [_attention_bwd_queries_kernel],
    fits=lambda constants, sizes: _fits(constants["BLOCK_M"], constants["BLOCK_N"], sizes[0], sizes[1]),
)


def _fits(block_m: int, block_n: int, head_dim: int, itemsize: int) -> bool:
    """Leaves out tiles that are far from fitting into registers: those of scores and of what is summed up."""
    most = 16384 if itemsize == 2 else 4096
    return block_m * block_n <= 2 * most and max(block_m, block_n) * head_dim <= 2 * most
