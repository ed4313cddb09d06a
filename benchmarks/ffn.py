"""The sparse FFN against the dense one on the CPU: training step, decoding, memory.

    python -m benchmarks.ffn [--quick] [--precision bfloat16]

Parity comes first: outputs and gradients of every contender against the reference; nothing is reported if one fails.
Then all contenders take turns in one process, on equal weights and the same random routing, and ratios are medians
over the turns. Dense multiplies weights stored as `nn.Linear` stores them, the others weights stored neuron by neuron,
as `convert` leaves them. Training is forward and backward with gradients of input, weights and bias; decoding is the
forward alone over as many layers as it takes to push the weights out of the cache. `grouped_mm` and `batched_mm` are
transformers' (`transformers_mm.py`); the latter copies the weights once per token, so it takes part in decoding only;
`eager` is our reference, which stands for the loop over experts that transformers calls eager. `auto` is the backend
that it chooses.

    share of ideal = speedup · K/E        with router = dense / (sparse + scoring and choosing the experts)
    share of matmul = FLOP/s / FLOP/s of one large product        memory = most bytes allocated, over dense's

With `--precision bfloat16` dense and `fused` take part in float32, under autocast and with weights of bfloat16, in
training and prefill. Ratios are over the fastest dense one of the same run. Parity there is an error of at most 1.5
times that of all neurons multiplied by torch in bfloat16.

The last line is one JSON document.

Shapes: T tokens, D d_model, F d_ff, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks._memory import peak_bytes
from benchmarks.transformers_mm import batched_mm, grouped_mm
from switchable.compute.call import ExpertCall, FFNWeights
from switchable.compute.choose import choose, expert_ffn
from switchable.compute.cpu.experts.library import library
from switchable.compute.cpu.topk import top_experts
from switchable.ffn.router import Router
from switchable.timing import Times, processor, take_turns

TRANSFORMERS = {"grouped_mm": grouped_mm, "batched_mm": batched_mm}
"""How transformers computes experts; its `eager` is a loop like our `reference`."""
THEIRS = ("eager", *TRANSFORMERS)
PARITY = 1e-5  # relative root mean square error in float32
CACHE_BYTES = 64 * 2**20
OURS = {"train": "fused", "decode": "decode"}


@dataclass(frozen=True)
class Shape:
    T: int
    D: int
    F: int
    E: int = 32
    K: int = 6

    def __str__(self) -> str:
        return f"T={self.T} D={self.D} F={self.F} E={self.E} K={self.K}"

    @property
    def forward_flops(self) -> float:
        """Of the dense layer."""
        return 4.0 * self.T * self.D * self.F


TRAINING = [Shape(4096, D, 4 * D) for D in (256, 512, 768)]
DECODING = [Shape(T, D, 4 * D) for D in (256, 512, 768) for T in (1, 16)]


class Layer:
    """One FFN as `nn.Linear` stores it, a batch, and a choice of experts."""

    def __init__(self, shape: Shape, seed: int = 0):
        torch.manual_seed(seed)
        self.shape = shape
        self.x_TD = torch.randn(shape.T, shape.D, requires_grad=True)
        self.up, self.down = torch.nn.Linear(shape.D, shape.F), torch.nn.Linear(shape.F, shape.D, bias=False)
        self.down_FD = self.down.weight.detach().t().contiguous().requires_grad_()
        self.ids_TK = torch.rand(shape.T, shape.E).topk(shape.K).indices
        self.dy_TD = torch.randn(shape.T, shape.D)
        self.router = Router(shape.D, shape.E)

    def leaves(self) -> dict[str, Tensor]:
        up_bias = self.up.bias
        assert up_bias is not None
        return {"x": self.x_TD, "up": self.up.weight, "down": self.down_FD, "bias": up_bias}

    def call(self) -> ExpertCall:
        """The sparse layer's call."""
        weights = FFNWeights(self.up.weight, self.down_FD, self.up.bias)
        return ExpertCall(self.x_TD, weights, self.ids_TK, self.shape.E, "relu")

    def forward(self, name: str) -> Tensor:
        if name == "dense":
            return linear(torch.relu(self.up(self.x_TD)), self.down.weight)
        if name in TRANSFORMERS:
            return TRANSFORMERS[name](self.call())
        return expert_ffn(self.call(), "reference" if name == "eager" else name)

    def forget(self) -> None:
        """Free all gradients, and the memory that compiled loops keep from call to call."""
        self._zero_grad()
        library.cache_clear()

    def _zero_grad(self) -> None:
        for leaf in (*self.leaves().values(), self.down.weight):
            leaf.grad = None

    def train(self, name: str) -> None:
        self._zero_grad()
        torch.autograd.backward(self.forward(name), self.dy_TD)

    def route(self) -> None:
        top_experts(self.router(self.x_TD.detach()).detach(), self.shape.K)


def parity_errors() -> list[str]:
    """Return one line for each contender and tensor that differs from `eager`."""
    lines = []
    for shape, names in (
        (Shape(300, 64, 256, 8, 3), ("fused", "sorted", "grouped_mm", "batched_mm")),
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
    names = ("dense", "eager", "grouped_mm", "sorted", "fused")
    product = partial(
        torch.mm, layer.x_TD.detach(), layer.up.weight.detach().t(), out=torch.empty(shape.T, shape.F)
    )
    calls: dict[str, Callable[[], object]] = {name: partial(layer.train, name) for name in names}
    times = take_turns({**calls, "router": layer.route, "product": product}, seconds)
    flops = 3 * shape.forward_flops
    rate = shape.forward_flops / 2 / times.median("product")
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


class HalfLayer(Layer):
    """The same numbers as float32 and as bfloat16; a contender's name says which, as in `fused autocast`."""

    def __init__(self, shape: Shape, seed: int = 0):
        super().__init__(shape, seed)
        with torch.no_grad():
            for leaf in (*self.leaves().values(), self.down.weight):
                leaf.copy_(leaf.bfloat16())
            self.down_FD.copy_(self.down.weight.t())
        self.dy_TD = self.dy_TD.bfloat16().float()
        self.halves = {name: leaf.detach().bfloat16() for name, leaf in self.leaves().items()}
        self.halves["dense down"] = self.down.weight.detach().bfloat16()
        for leaf in self.halves.values():
            leaf.requires_grad_()

    def leaves_of(self, name: str) -> dict[str, Tensor]:
        """What a contender is given."""
        return self.halves if name.endswith("weights") else {**self.leaves(), "dense down": self.down.weight}

    def forward(self, name: str) -> Tensor:
        own, (way, precision) = self.leaves_of(name), name.split()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            if way == "dense":
                return linear(torch.relu(linear(own["x"], own["up"], own["bias"])), own["dense down"])
            weights = FFNWeights(own["up"], own["down"], own["bias"])
            return expert_ffn(ExpertCall(own["x"], weights, self.ids_TK, self.shape.E, "relu"), way)

    def _zero_grad(self) -> None:
        super()._zero_grad()
        for leaf in self.halves.values():
            leaf.grad = None

    def train(self, name: str) -> None:
        self._zero_grad()
        y_TD = self.forward(name)
        torch.autograd.backward(y_TD, self.dy_TD.to(y_TD.dtype))

    def prefill(self, name: str) -> None:
        with torch.no_grad():
            self.forward(name)

    def errors(self, name: str, true: dict[str, Tensor]) -> dict[str, float]:
        """Return a contender's relative errors in the output and all gradients."""
        own = {leaf: tensor for leaf, tensor in self.leaves_of(name).items() if leaf in true}
        y_TD = self.forward(name)
        gradients = torch.autograd.grad(y_TD, list(own.values()), self.dy_TD.to(y_TD.dtype))
        found = {"y": y_TD.detach(), **dict(zip(own, gradients, strict=True))}
        return {leaf: float((found[leaf] - wanted).norm() / wanted.norm()) for leaf, wanted in true.items()}


PRECISIONS = ("float32", "autocast", "weights")


def half_parity_errors() -> list[str]:
    """Return one line for each contender and tensor that is worse than torch's in bfloat16."""
    layer = HalfLayer(Shape(301, 64, 256, 8, 3))
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in layer.leaves().items()}
    call = ExpertCall(
        exact["x"], FFNWeights(exact["up"], exact["down"], exact["bias"]), layer.ids_TK, 8, "relu"
    )
    y_TD = expert_ffn(call, "reference")
    gradients = torch.autograd.grad(y_TD, list(exact.values()), layer.dy_TD.double())
    true = {"y": y_TD.detach(), **dict(zip(exact, gradients, strict=True))}
    lines = []
    for precision in PRECISIONS[1:]:
        most, found = (layer.errors(f"{way} {precision}", true) for way in ("masked", "fused"))
        lines += [
            f"fused {precision} is off in {tensor}: relative error {error:.1e}, dense {most[tensor]:.1e}"
            for tensor, error in found.items()
            if not error <= 1.5 * most[tensor]
        ]
    return lines


def half_row(shape: Shape, seconds: float) -> dict[str, Any]:
    """Time training and prefill in both precisions."""
    layer = HalfLayer(shape)
    names = [f"{way} {precision}" for way in ("dense", "fused") for precision in PRECISIONS]
    row: dict[str, Any] = {"shape": str(shape)}
    for job in ("train", "prefill"):
        calls = {name: partial(getattr(layer, job), name) for name in names}
        times = take_turns(calls, seconds / 2)
        dense, ours = (
            min((n for n in names if n.startswith(way)), key=times.median) for way in ("dense", "fused")
        )
        row[job] = {
            "ms": {name: 1e3 * value for name, value in times.medians.items()},
            "best_dense": dense,
            "ours": ours,
            "over_best_dense": times.ratio(dense, ours),
        }
        if job == "train":
            dense_peak, peak = (peak_bytes(calls[name], layer.forget) for name in (dense, ours))
            row["memory_share"] = peak / dense_peak
        report_half(job, row)
    return row


def report_half(job: str, row: dict[str, Any]) -> None:
    """Print one job of a shape."""
    own = row[job]
    print(f"\n{job}: {row['shape']}")
    for name, value in own["ms"].items():
        print(f"  {name:<16}{value:>9.3f} ms {own['ms'][own['best_dense']] / value:>6.2f}x best dense")
    print(f"  {own['ours']}: {own['over_best_dense']:.2f}x {own['best_dense']} (within a turn)")


def half_main(seconds: float) -> int:
    """Run everything in bfloat16; return the exit code."""
    errors = half_parity_errors()
    if errors:
        print("\n".join(errors), file=sys.stderr)
        return 1
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, bfloat16")
    rows = {shape.D: half_row(shape, seconds) for shape in TRAINING}
    document = {
        **{f"train_over_best_dense_d{width}": row["train"]["over_best_dense"] for width, row in rows.items()},
        "prefill_over_best_dense_d768": rows[768]["prefill"]["over_best_dense"],
        "memory_share": rows[768]["memory_share"],
        "machine": {"processor": processor(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "shapes": list(rows.values()),
    }
    print(json.dumps(document))
    return 0


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
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    seconds = 5.0 if arguments.quick else 30.0
    if arguments.precision == "bfloat16":
        return half_main(2 * seconds)
    errors = parity_errors()
    if errors:
        print("\n".join(errors), file=sys.stderr)
        return 1
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    rows = []
    for shape in TRAINING:
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
        "train_memory_share": train["peak_mib"][OURS["train"]] / train["peak_mib"]["dense"],
        "decode_ffn_speedup": decoding["speedup"][OURS["decode"]],
        "machine": {"processor": processor(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "shapes": rows,
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
