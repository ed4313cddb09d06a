"""Which block sizes the Triton kernels may choose from: measured once per shape, then remembered on disk.

Results are kept by the sizes of the product, the layout and the *bucket* of the mean rows per expert, so that a new
batch size seldom means a new measurement. Measuring waits for the GPU: run each shape once before a clock starts or a
CUDA graph is captured. Block sizes change the order of the sums, so another choice means other last bits.

The lists suit an H100: blocks of 128 x 256 and 128 x 128 keep the tensor cores busy in training, blocks of 16 rows
with a deep K read weights fast in decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

from switchable.compute.cuda.triton import INTERPRETED


def _config(m: int, n: int, k: int, warps: int, stages: int) -> Any:
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


# Small first: the first one is used where none suits. Triton's interpreter has nothing to tune.
ROWS = [_config(16, 32, 32, 4, 1)]
WEIGHTS = [_config(16, 32, 32, 4, 1)]
if not INTERPRETED:
    ROWS = [
        _config(16, 32, 128, 4, 4),  # decoding: reading weights is all the work
        _config(16, 64, 128, 4, 4),
        _config(16, 128, 64, 4, 4),
        _config(64, 64, 64, 4, 4),
        _config(64, 128, 64, 4, 4),
        _config(64, 256, 64, 8, 3),
        _config(128, 128, 32, 4, 4),
        _config(128, 128, 64, 8, 3),
        _config(128, 256, 64, 8, 3),
        _config(128, 256, 64, 8, 4),
    ]
    WEIGHTS = [  # five stages keep two blocks on their way: rows are found by a load that others wait for
        _config(32, 64, 32, 4, 5),
        _config(64, 128, 64, 4, 5),
        _config(128, 128, 32, 4, 5),
        _config(128, 128, 64, 8, 3),
        _config(128, 128, 64, 8, 5),
        _config(128, 256, 64, 8, 3),
        _config(128, 256, 64, 8, 5),
    ]


def bucket_of(rows: int, num_experts: int) -> int:
    """Return the mean rows per expert as a power of four in [4, 4096], by which tuning results are kept."""
    bucket = 4
    while bucket < 4096 and bucket * 2 <= rows // num_experts:
        bucket *= 4
    return bucket


def _fits(block: int, size: int) -> bool:
    return block <= max(32, 1 << (size - 1).bit_length())  # the next power of two


def _pick(configs: list[Any], suits: Callable[[dict[str, int]], bool], precision: str) -> list[Any]:
    def affordable(sizes: dict[str, int]) -> bool:
        # Exact float32 products use no tensor cores: larger blocks spill and are slow to compile.
        small = sizes["BLOCK_M"] * sizes["BLOCK_N"] <= 64 * 64 and sizes["BLOCK_K"] <= 64
        return precision != "ieee" or small

    return [c for c in configs if suits(c.kwargs) and affordable(c.kwargs)] or configs[:1]


def _suit_rows(configs: list[Any], named: dict[str, Any], **constants: Any) -> list[Any]:
    """Drop configs whose blocks are much larger than the matrices, or much smaller than an expert's rows."""
    call = named | constants
    bucket = call["bucket"]

    def suits(sizes: dict[str, int]) -> bool:
        rows_fit = sizes["BLOCK_M"] == 16 if bucket < 16 else sizes["BLOCK_M"] <= bucket
        wide = bucket >= 256 and sizes["BLOCK_M"] == 16
        columns_fit = _fits(sizes["BLOCK_N"], call["N"]) and _fits(sizes["BLOCK_K"], call["DEPTH"])
        return rows_fit and not wide and columns_fit

    return _pick(configs, suits, call["PRECISION"])


def _suit_weights(configs: list[Any], named: dict[str, Any], **constants: Any) -> list[Any]:
    call = named | constants

    def suits(sizes: dict[str, int]) -> bool:
        return _fits(sizes["BLOCK_M"], call["I"]) and _fits(sizes["BLOCK_N"], call["D"])

    return _pick(configs, suits, call["PRECISION"])


PRUNE = {"early_config_prune": _suit_rows}
PRUNE_WEIGHTS = {"early_config_prune": _suit_weights}
