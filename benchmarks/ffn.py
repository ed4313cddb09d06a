"""The sparse FFN against the dense one on the CPU: training step, decoding, memory.

    python -m benchmarks.ffn [--quick | --sweep] [--precision bfloat16]

Parity comes first: outputs and gradients of every contender against the reference; nothing is reported if one fails.
Then all contenders take turns in one process, on equal weights and the same random routing, and ratios are medians
over the turns. Dense multiplies weights stored as `nn.Linear` stores them, the others weights stored neuron by neuron,
as `convert` leaves them. Training is forward and backward with gradients of input, weights and bias; decoding is the
forward alone over as many layers as it takes to push the weights out of the cache. `grouped_mm` and `batched_mm` are
transformers' (`transformers_mm.py`); the latter copies the weights once per token, so it takes part in decoding only;
`eager` is our reference, which stands for the loop over experts that transformers calls eager. `auto` is the backend
that it chooses.

Of the gated FFN (Llama's, D=768, F=2,048) only dense, `eager` and `fused` train; its whole layer is in bfloat16's run.

    share of ideal = speedup · K/E        with router = dense / (sparse + scoring and choosing the experts)
    share of matmul = FLOP/s / FLOP/s of one large product        memory = most bytes allocated, over dense's

With `--precision bfloat16` dense and `fused` take part in float32, under autocast and with weights of bfloat16, in
training and prefill. Ratios are over the fastest dense one of the same run. Parity there is an error of at most 1.5
times that of all neurons multiplied by torch in bfloat16. `layer` is a whole converted layer: in training under
autocast, where its router scores, chooses and learns, for which a sixteenth of the tokens multiply all neurons besides;
in prefill with weights of bfloat16.

`--sweep` times the whole layer at every shape instead (`ffn_sweep.py`). The last line is one JSON document.

Shapes: T tokens, D d_model, F d_ff, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import ffn_bfloat16, ffn_sweep
from benchmarks._ffn_layer import GATED, TRAINING, TRANSFORMERS, Layer, Shape
from benchmarks._memory import peak_bytes
from switchable.compute.choose import choose
from switchable.memory import keep_freed_memory
from switchable.timing import Times, processor, take_turns

THEIRS = ("eager", *TRANSFORMERS)
PARITY = 1e-5  # relative root mean square error in float32
CACHE_BYTES = 64 * 2**20
OURS = {"train": "fused", "decode": "decode"}


DECODING = [Shape(T, D, 4 * D) for D in (256, 512, 768) for T in (1, 16)]


def parity_errors() -> list[str]:
    """Return one line for each contender and tensor that differs from `eager`."""
    lines = []
    for shape, names in (
        (Shape(300, 64, 256, 8, 3), ("fused", "grouped_mm", "batched_mm")),
        (Shape(300, 64, 256, 8, 3, gated=True), ("fused",)),
        (Shape(2, 64, 256), ("decode",)),
    ):
        layer = Layer(shape)
        wanted = _results(layer, "eager", backward=names != ("decode",))
        for name in names:
            for tensor, value in _results(layer, name, backward=names != ("decode",)).items():
                error = float((value - wanted[tensor]).norm() / wanted[tensor].norm())
                if not error < PARITY:
                    lines.append(
                        f"{name} differs from eager in {tensor}: relative error {error:.1e} at {shape}"
                    )
    return lines


def _results(layer: Layer, name: str, backward: bool) -> dict[str, Tensor]:
    if not backward:
        with torch.no_grad():
            return {"y": layer.forward(name)}
    y_TD = layer.forward(name)
    gradients = torch.autograd.grad(y_TD, list(layer.leaves().values()), layer.dy_TD)
    return {"y": y_TD.detach(), **dict(zip(layer.leaves(), gradients, strict=True))}


def train_row(shape: Shape, seconds: float) -> dict[str, Any]:
    """Time forward and backward."""
    layer = Layer(shape)
    names = ("dense", "eager", *(() if shape.gated else ("grouped_mm",)), "fused")
    product = partial(
        torch.mm, layer.x_TD.detach(), layer.up.weight.detach().t(), out=torch.empty(shape.T, shape.F)
    )
    calls: dict[str, Callable[[], object]] = {name: partial(layer.train, name) for name in names}
    times = take_turns({**calls, "router": layer.route, "product": product}, seconds)
    flops = 3 * shape.forward_flops
    rate = shape.product_flops / times.median("product")
    row = _row(shape, times, "train", names, choose(layer.call()).name)
    row["share_of_ideal"] = row["speedup"][OURS["train"]] * shape.K / shape.E
    row["share_of_matmul"] = {
        name: flops * (1.0 if name == "dense" else shape.K / shape.E) / times.median(name) / rate
        for name in names
    }
    row["peak_mib"] = {name: peak_bytes(calls[name], layer.forget) / 2**20 for name in names}
    return row


def decode_row(shape: Shape, seconds: float) -> dict[str, Any]:
    """Time the forward alone, going through several layers."""
    count = max(2, min(32, CACHE_BYTES // (8 * shape.D * shape.F)))
    layers = [Layer(shape, seed) for seed in range(count)]
    names = (
        ("dense", "grouped_mm", "batched_mm", "decode") if shape.T == 1 else ("dense", "grouped_mm", "decode")
    )

    def through(call: str, *arguments: Any) -> None:
        for layer in layers:
            getattr(layer, call)(*arguments)

    calls: dict[str, Callable[[], object]] = {name: partial(through, "forward", name) for name in names}
    with torch.no_grad():
        times = take_turns({**calls, "router": partial(through, "route")}, seconds)
        auto = choose(layers[0].call()).name
    per_layer = Times({name: [value / count for value in values] for name, values in times.seconds.items()})
    return _row(shape, per_layer, "decode", names, auto)


def _row(shape: Shape, times: Times, job: str, names: tuple[str, ...], auto: str) -> dict[str, Any]:
    own = OURS[job]
    best = min((name for name in names if name in THEIRS), key=times.median)
    return {
        "job": job,
        "shape": str(shape),
        "ms": {name: 1e3 * times.median(name) for name in (*names, "router")},
        "speedup": {name: times.ratio("dense", name) for name in names},
        "speedup_with_router": times.median("dense") / (times.median(own) + times.median("router")),
        "vs_best_transformers": times.ratio(best, own),
        "best_transformers": best,
        "auto": auto,
    }


def report(row: dict[str, Any]) -> None:
    """Print one shape."""
    print(f"\n{row['job']}: {row['shape']}")
    for name, speedup in row["speedup"].items():
        line = f"  {name:<12}{row['ms'][name]:>9.3f} ms {speedup:>6.2f}x dense"
        if "peak_mib" in row:
            memory = row["peak_mib"][name]
            line += f"{100 * row['share_of_matmul'][name]:>5.0f} % of matmul rate"
            line += f"{memory:>8.0f} MiB at the peak ({memory / row['peak_mib']['dense']:.2f} of dense)"
        print(line)
    ideal = f", {100 * row['share_of_ideal']:.0f} % of the ideal" if "share_of_ideal" in row else ""
    print(
        f"  ours: {row['vs_best_transformers']:.2f}x {row['best_transformers']}{ideal}; with the router "
        f"({row['ms']['router']:.3f} ms) {row['speedup_with_router']:.2f}x dense; auto: {row['auto']}"
    )


def main() -> int:
    """Run everything; return the exit code."""
    parser = argparse.ArgumentParser(description="The sparse FFN against the dense one on the CPU.")
    parser.add_argument("--quick", action="store_true", help="under 50 seconds")
    parser.add_argument("--sweep", action="store_true", help="where a whole layer is slower than a dense one")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    if arguments.sweep:
        return ffn_sweep.main(arguments.precision)
    keep_freed_memory()  # as runs do
    seconds = 5.0 if arguments.quick else 30.0
    if arguments.precision == "bfloat16":
        return ffn_bfloat16.main(2 * seconds)
    errors = parity_errors()
    if errors:
        print("\n".join(errors), file=sys.stderr)
        return 1
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    rows = []
    for shape in (*TRAINING, GATED):
        rows.append(train_row(shape, seconds))
        report(rows[-1])
    for shape in DECODING:
        rows.append(decode_row(shape, seconds / 5))
        report(rows[-1])
    by_shape = {(row["job"], row["shape"]): row for row in rows}
    train = by_shape["train", str(Shape(4096, 768, 3072))]
    decoding = by_shape["decode", str(Shape(1, 768, 3072))]
    document = {
        "train_speedup": train["speedup"][OURS["train"]],
        "train_vs_best_transformers": train["vs_best_transformers"],
        "train_share_of_ideal": train["share_of_ideal"],
        "train_gated_speedup": by_shape["train", str(GATED)]["speedup"][OURS["train"]],
        "train_memory_share": train["peak_mib"][OURS["train"]] / train["peak_mib"]["dense"],
        "decode_ffn_speedup": decoding["speedup"][OURS["decode"]],
        "machine": {"processor": processor(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "shapes": rows,
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
