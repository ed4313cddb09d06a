"""Which block sizes the Triton kernels may choose from: measured once per shape, then remembered on disk.

Results are kept by the sizes of the product, the layout and the *bucket* of the mean rows per expert, so that a new
batch size seldom means a new measurement. Measuring waits for the GPU: run each shape once before a clock starts or a
CUDA graph is captured. Block sizes change the order of the sums, so another choice means other last bits.

The lists suit an H100: blocks of 128 x 256 and 128 x 128 keep the tensor cores busy in training, blocks of 16 rows
with a deep K read weights fast in decoding.
"""

from __future__ import annotations

from typing import Any

import triton

INTERPRETED = triton.knobs.runtime.interpret


def _configs(*sizes: tuple[int, int, int, int, int]) -> list[Any]:
    """Of BLOCK_M, BLOCK_N, BLOCK_K, warps, stages. Triton's interpreter has nothing to tune."""
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in ([(16, 32, 32, 4, 1)] if INTERPRETED else sizes)
    ]


# Small first: the first one is used where none suits. Blocks of 16 rows are for decoding, which reads weights.
ROWS = _configs(
    (16, 32, 128, 4, 4), (16, 64, 128, 4, 4), (16, 128, 64, 4, 4), (64, 64, 64, 4, 4), (64, 128, 64, 4, 4),
    (64, 256, 64, 8, 3), (128, 128, 32, 4, 4), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
)  # fmt: skip
# Five stages keep two blocks on their way: rows are found by a load that others wait for.
WEIGHTS = _configs(
    (32, 64, 32, 4, 5), (64, 128, 64, 4, 5), (128, 128, 32, 4, 5), (128, 128, 64, 8, 3), (128, 128, 64, 8, 5),
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 5),
)  # fmt: skip


def bucket_of(rows: int, num_experts: int) -> int:
    """Return the mean rows per expert as a power of four in [4, 4096], by which tuning results are kept."""
    bucket = 4
    while bucket < 4096 and bucket * 2 <= rows // num_experts:
        bucket *= 4
    return bucket


def _fits(block: int, size: int) -> bool:
    return block <= max(32, 1 << (size - 1).bit_length())  # the next power of two


def _prune(configs: list[Any], named: dict[str, Any], **constants: Any) -> list[Any]:
    """Drop configs whose blocks are much larger than the matrices, or much smaller than an expert's rows."""
    call = named | constants
    bucket, exact = call["bucket"], call["PRECISION"] == "ieee"

    def suits(sizes: dict[str, int]) -> bool:
        m, n, k = (sizes[f"BLOCK_{axis}"] for axis in "MNK")
        if exact and (m * n > 64 * 64 or k > 64):
            return False  # exact float32 products use no tensor cores: larger blocks spill and compile slowly
        if "DEPTH" not in call:  # gradients of weights: rows are what is summed, and there are always enough
            return _fits(m, call["I"]) and _fits(n, call["D"])
        rows_fit = m == 16 if bucket < 16 else m <= bucket
        wide = bucket >= 256 and m == 16
        return rows_fit and not wide and _fits(n, call["N"]) and _fits(k, call["DEPTH"])

    return [config for config in configs if suits(config.kwargs)] or configs[:1]


PRUNE = {"early_config_prune": _prune}
