"""Whether a sparse layer is anywhere slower than the dense one: see `ffn.py`, which runs it with `--sweep`.

A whole converted layer, router and backend `auto`, against the fastest dense FFN: in training, where its router
learns, and without gradients. In bfloat16 the layer trains under autocast and then has weights of bfloat16; dense may
be float32 all the same. With one thread CPU time is taken, which others' work does not reach.

Shapes: T tokens, D d_model, F d_ff, E experts, K experts per token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks._ffn_layer import Shape
from benchmarks.ffn_bfloat16 import HalfLayer
from switchable.timing import processor, take_turns

WIDTHS = (128, 256, 512, 768, 1024)
EXPERTS = (8, 32, 128)
TOKENS = (64, 512, 4096)
MANY_TOKENS = 16_384
WIDEST_OF_MANY = 256
"""So many tokens are tried up to here: beyond, they take minutes and tell nothing new."""
SLOWER = 0.97
"""A layer counts as slower below this speed-up: times of equal calls differ by so much."""
SHORTEST = 0.004
"""Seconds that are timed at once, at least."""
JOBS = {"train": "autocast", "prefill": "weights"}
"""How the layer multiplies in bfloat16."""


def shapes() -> Iterator[tuple[Shape, str]]:
    """Yield shapes, 3 of 16 experts on and F = 4 D (gated 8/3 D), and what to do with them."""
    for gated, width, experts in product((False, True), WIDTHS, EXPERTS):
        unit = 128 if gated else 1
        d_ff = round(8 / 3 * width / unit) * unit if gated else 4 * width
        for tokens in (*TOKENS, MANY_TOKENS):
            if tokens < MANY_TOKENS or (width <= WIDEST_OF_MANY and experts == 32):
                shape = Shape(tokens, width, d_ff, experts, round(3 / 16 * experts + 0.01), gated)
                yield from ((shape, job) for job in JOBS)


def row_of(shape: Shape, job: str, precision: str, ways: tuple[str, ...] = ()) -> dict[str, Any]:
    """Time one shape; `ways` are backends that do the experts alone, to see what else there is."""
    layer, kind = HalfLayer(shape), "float32" if precision == "float32" else JOBS[job]
    dense = list(dict.fromkeys(("dense float32", f"dense {kind}")))
    names = [*dense, *(f"{way} {kind}" for way in ("layer", *ways))]
    calls = {name: partial(getattr(layer, job), name) for name in names}
    if ways:
        calls["router"] = layer.route
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    layer.set_training(job == "train")
    once = take_turns({name: calls[name] for name in dense}, 0.0, turns=1).medians
    repeat = max(1, round(SHORTEST / min(once.values())))
    times = take_turns(calls, 0.2, repeat, clock=clock)
    best = min(dense, key=times.median)
    return {
        "job": job,
        "shape": str(shape),
        "best_dense": best,
        "ms": {name: 1e3 * seconds for name, seconds in times.medians.items()},
        "layer_over_best_dense": times.ratio(best, f"layer {kind}"),
    }


def main(precision: str) -> int:
    """Time all shapes; return the exit code."""
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {precision}")
    rows = []
    for shape, job in shapes():
        rows.append(row_of(shape, job, precision))
        found = rows[-1]["layer_over_best_dense"]
        mark = "  slower" if found < SLOWER else ""
        print(f"  {job:<8}{shape!s:<42}{found:>6.2f}x {rows[-1]['best_dense']}{mark}", flush=True)
    worst = min(rows, key=lambda row: row["layer_over_best_dense"])
    document = {
        "precision": precision,
        "shapes": len(rows),
        "slower": sum(row["layer_over_best_dense"] < SLOWER for row in rows),
        "worst": worst["layer_over_best_dense"],
        "worst_shape": f"{worst['job']} {worst['shape']}",
        "machine": {"processor": processor(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "rows": rows,
    }
    print(json.dumps(document))
    return 0
