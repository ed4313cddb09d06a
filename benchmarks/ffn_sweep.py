"""Whether our layer is anywhere slower than the dense one: see `ffn.py`, which runs it with `--sweep`.

A whole converted layer, router and backend `auto`, against the fastest dense FFN: in training, where its router
learns, and without gradients. In bfloat16 the layer trains under autocast and then has weights of bfloat16; dense may
be float32 all the same. With one thread CPU time is taken, which others' work does not reach.

    sparse   the layer in sparse mode, as a user who asks for it gets it, over the fastest dense product
    chosen   in training, what a run with recipe `auto` does: its controller times the layer and decides, before
             `min_dense_fraction`, with a tenth of the neurons active; over the module of transformers that the layer
             replaces, which computes the same function, in the fastest dense precision
    router   in dense steps, the share of the chosen way's time in which its router learns

Without gradients the chosen way is the layer in dense mode: which of the two functions is wanted is the user's choice.

Shapes: T tokens, D d_model, F d_ff, E experts, K experts per token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks._ffn_layer import Shape
from benchmarks.ffn_bfloat16 import HalfLayer
from switchable import Controller
from switchable.ffn.convert import layers_of
from switchable.ffn.layer import SwitchableFFN
from switchable.switching.monitor import LayerMeasures
from switchable.timing import processor, take_turns

WIDTHS = (128, 256, 512, 768, 1024)
EXPERTS = (8, 32, 128)
TOKENS = (64, 512, 4096)
MANY_TOKENS = 16_384
WIDEST_OF_MANY = 256
"""So many tokens are tried up to here: beyond, they take minutes and tell nothing new."""
SLOWER = 0.97
"""A layer counts as slower below this speed-up: times of equal calls differ by so much."""
ACTIVE = 0.1
"""Share of the neurons that are active in the layer."""
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
    own = layers_of(layer.wholes[kind])[0]
    _make_few_active(own, layer.leaves_of(kind)["x"])
    layer.set_training(job == "train")
    dense = list(dict.fromkeys(("dense float32", f"dense {kind}")))
    calls = {name: partial(getattr(layer, job), name) for name in dense}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    once = take_turns(calls, 0.0, turns=1).medians
    repeat, best = max(1, round(SHORTEST / min(once.values()))), min(dense, key=lambda name: once[name])
    way, why = ("dense", "") if job != "train" else decided(layer, kind)
    run = partial(getattr(layer, job), f"layer {kind}")
    module = best.replace("dense", "module")
    calls |= {module: partial(getattr(layer, job), module)}
    calls |= {name: partial(getattr(layer, job), f"{name} {kind}") for name in ways}
    calls |= {name: partial(_multiplied, own, name, run) for name in dict.fromkeys(("sparse", way))}
    if way != "sparse":
        calls["no router"] = partial(_multiplied, own, way, run, learns=False)
    if ways:
        calls["router"] = layer.route
    times = take_turns(calls, 0.2, repeat, clock=clock)
    best = min(dense, key=times.median)
    return {
        "job": job,
        "shape": str(shape),
        "best_dense": best,
        "ms": {name: 1e3 * seconds for name, seconds in times.medians.items()},
        "layer_over_best_dense": times.ratio(best, "sparse"),
        "chosen": way,
        "why": why,
        "chosen_over_module": times.ratio(module, way),
        "router_share": 0.0 if way == "sparse" else 1 - times.ratio(way, "no router") ** -1,
    }


@torch.no_grad()
def _make_few_active(layer: SwitchableFFN, x_TD: Tensor) -> None:
    """Shift what decides whether neurons fire by an input that is always 1, until so few of them do."""
    x_TD[:, 0] = 1.0
    reads_FD = layer.ssd.reads_FD
    reads_FD[:, 0] -= torch.quantile((x_TD[:64] @ reads_FD.t()).float(), 1 - ACTIVE)


def _multiplied(layer: SwitchableFFN, way: str, run: Callable[[], object], *, learns: bool = True) -> None:
    """Run a layer that multiplies in one way."""
    ssd = layer.ssd
    ssd.mode, ssd.multiplies_active = ("sparse" if way == "sparse" else "dense"), way == "active"
    ssd.router_learns, ssd.activation_ratio = learns, 0.0  # as where costs decide
    run()


def decided(layer: HalfLayer, kind: str) -> tuple[str, str]:
    """Return how a run with recipe `auto` multiplies such a layer early in training, and the numbers compared."""
    half = partial(torch.autocast, "cpu", torch.bfloat16, enabled=kind == "autocast")
    controller = Controller(
        layer.wholes[kind], layer.leaves_of(kind)["x"].detach()[None], 1000, precision=half
    )
    controller.time_layers()
    experts, chosen = layer.shape.E, layer.shape.K
    mass = (0.0,) * (chosen - 1) + (1.0,) * (experts - chosen + 1)
    sparse = LayerMeasures(
        ACTIVE, 1.0, mass, mass, 1.0, 1.0, experts_per_token=chosen, pattern_similarity=1.0
    )
    decision = controller.schedule.decide(controller.schedule.joins_from, controller.state, [sparse])
    (cost,), (way,) = controller.schedule.costs, decision.state.ways
    return way, cost.told(ACTIVE, chosen / experts)


def main(precision: str) -> int:
    """Time all shapes; return the exit code."""
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {precision}")
    rows = []
    for shape, job in shapes():
        rows.append(row_of(shape, job, precision))
        report(rows[-1])
    worst = min(rows, key=lambda row: row["layer_over_best_dense"])
    trained = [row for row in rows if row["job"] == "train"]
    document = {
        "precision": precision,
        "shapes": len(rows),
        "slower": sum(row["layer_over_best_dense"] < SLOWER for row in rows),
        "worst": worst["layer_over_best_dense"],
        "worst_shape": f"{worst['job']} {worst['shape']}",
        "chosen": {
            way: sum(row["chosen"] == way for row in trained) for way in ("dense", "active", "sparse")
        },
        "chosen_slower": sum(row["chosen_over_module"] < SLOWER for row in rows),
        "chosen_slower_without_router": sum(_without_router(row) < SLOWER for row in rows),
        "machine": {"processor": processor(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "rows": rows,
    }
    print(json.dumps(document))
    return 0


def _without_router(row: dict[str, Any]) -> float:
    """Return how fast the chosen way is but for the time in which its router learns."""
    return float(row["chosen_over_module"] / (1 - row["router_share"]))


def report(row: dict[str, Any]) -> None:
    """Print one row."""
    sparse, chosen = row["layer_over_best_dense"], row["chosen_over_module"]
    print(
        f"  {row['job']:<8}{row['shape']:<42}sparse {sparse:>5.2f}x {row['best_dense']:<16}"
        f"chosen: {row['chosen']:<7}{chosen:>5.2f}x, {_without_router(row):.2f}x but for its router"
        f"{'  slower' if chosen < SLOWER else ''}; {row['why']}",
        flush=True,
    )
