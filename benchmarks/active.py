"""Training a dense FFN from its active neurons alone, against multiplying all of them.

    python -m benchmarks.active [--quick] [--precision bfloat16] [--gated]

Forward and backward of one FFN (ReLU, d_ff = 4 D) on 4,096 tokens of which each activates the given share of the
neurons, chosen at random. In bfloat16 there are layers with such weights and layers under autocast, and the best one
that multiplies active neurons only is compared with the best dense one, float32's included. All are timed in turns,
after outputs and gradients have been found right. The break-even is the share at which both take the same time (a
straight line through the shares measured). The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from switchable.compute.call import FFNWeights
from switchable.compute.cpu.active.active import active, has_active
from switchable.timing import processor, take_turns

TOKENS, EXPERTS = 4096, 32
FEW = 0.05
"""The share that is quoted."""
CHECKED_TOKENS = 601
TOLERANCE = 1e-5
"""Of the relative error in float32; in bfloat16 it is 1.5 times that of the dense layer."""
PRECISIONS = {"float32": ("float32",), "bfloat16": ("float32", "autocast", "weights")}
"""What contenders are called, by the precision that is measured."""


class Problem:
    """An FFN of bfloat16's numbers whose bias makes a share of its neurons active on normal tokens."""

    def __init__(self, d_model: int, share: float, *, gated: bool, tokens: int = TOKENS):
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator) * scale).bfloat16()

        d_ff = 4 * d_model
        self.dy_TD = normal(tokens, d_model)
        bias_F = torch.full((d_ff,), NormalDist().inv_cdf(share)).bfloat16()
        self.numbers = {
            "x": normal(tokens, d_model),
            "up": normal(d_ff, d_model, scale=d_model**-0.5),
            "down": normal(d_ff, d_model, scale=d_ff**-0.5),
            "bias": bias_F,
        }
        if gated:
            self.numbers |= {"gate": normal(d_ff, d_model, scale=d_model**-0.5), "gate_bias": bias_F}
        self.leaves = {dtype: self._leaves(dtype) for dtype in (torch.float32, torch.bfloat16)}

    def _leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: tensor.to(dtype).requires_grad_() for name, tensor in self.numbers.items()}

    def leaves_of(self, precision: str) -> tuple[dict[str, Tensor], FFNWeights]:
        """Return a contender's tensors."""
        dtype = torch.bfloat16 if precision == "weights" else torch.float32
        own = self._leaves(torch.float64) if precision == "exact" else self.leaves[dtype]
        names = ("up", "down", "bias", "gate", "gate_bias")
        return own, FFNWeights(*(own.get(name) for name in names))  # type: ignore[arg-type]

    def run(self, way: str, precision: str) -> dict[str, Tensor]:
        """Return the output and the gradients of input and weights."""
        leaves, weights = self.leaves_of(precision)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            if way == "dense":
                y_TD = linear(weights.activations(leaves["x"], "relu"), weights.down_FD.t())
            else:
                y_TD = active(leaves["x"], weights, "relu", num_experts=EXPERTS).y_TD
        gradients = torch.autograd.grad(y_TD, list(leaves.values()), self.dy_TD.to(y_TD.dtype))
        return {"y": y_TD.detach(), **dict(zip(leaves, gradients, strict=True))}


def is_off(d_model: int, share: float, gated: bool, precision: str) -> bool:
    """Whether there are no loops, or any of their results differs from the dense layer's."""
    problem = Problem(d_model, share, gated=gated, tokens=CHECKED_TOKENS)
    leaves, weights = problem.leaves_of(precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        if not has_active(leaves["x"], weights, "relu"):
            return True
    true, dense, ours = (
        problem.run(way, kind)
        for way, kind in (("dense", "exact"), ("dense", precision), ("active", precision))
    )

    def error(found: Tensor, wanted: Tensor) -> float:
        return float((found.double() - wanted).norm() / wanted.norm())

    def most(name: str) -> float:
        return TOLERANCE if precision == "float32" else 1.5 * error(dense[name], true[name])

    return not all(error(ours[name], wanted) <= most(name) for name, wanted in true.items())


def measure(
    d_model: int, shares: list[float], rounds: int, precision: str, gated: bool
) -> dict[str, Any] | None:
    """Return each share's speed-up over the best dense layer, and the break-even; None if a result is off."""
    dense = [f"dense {kind}" for kind in PRECISIONS[precision]]
    ours = [f"active {kind}" for kind in PRECISIONS[precision] if kind == precision or kind != "float32"]
    figures: dict[str, Any] = {}
    times, milliseconds = [], {}
    for share in shares:
        if any(is_off(d_model, share, gated, name.split()[1]) for name in ours):
            return None
        problem = Problem(d_model, share, gated=gated)
        found = take_turns(
            {name: partial(problem.run, *name.split()) for name in dense + ours}, 0.0, turns=rounds
        )
        best, own = (min(names, key=found.median) for names in (dense, ours))
        speedup = found.ratio(best, own)
        times.append(1 / speedup)
        figures[f"active_speedup_d{d_model}_{share:g}"] = speedup
        milliseconds[f"{share:g}"] = {name: 1e3 * value for name, value in found.medians.items()}
    slope, start = np.polyfit(shares, times, 1)
    figures[f"break_even_d{d_model}"] = float((1 - start) / slope)
    return figures | {f"ms_d{d_model}": milliseconds}


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three widths, few rounds (under 90 s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of what is measured")
    parser.add_argument("--gated", action="store_true", help="an FFN with a gate")
    args = parser.parse_args()
    shares = [0.02, FEW, 0.2] if args.quick else [0.02, FEW, 0.1, 0.2, 0.3]
    print(f"{'D':>5} " + " ".join(f"{f'{share:.0%}':>6}" for share in shares) + "  break-even")
    figures: dict[str, Any] = {}
    widths = (256, 512, 768) if args.quick else (128, 256, 512, 768)
    for d_model in widths:
        found = measure(d_model, shares, 5 if args.quick else 15, args.precision, args.gated)
        if found is None:
            print("the ways differ, or this processor has no loops: nothing is reported", file=sys.stderr)
            return 1
        *speedups, break_even, _ = found.values()
        print(f"{d_model:5} " + " ".join(f"{value:5.2f}x" for value in speedups) + f"  {break_even:9.1%}")
        figures |= found
    over_dense = {
        f"active_over_best_dense_d{width}": figures[f"active_speedup_d{width}_{FEW:g}"] for width in widths
    }
    document = {
        "benchmark": "active",
        "precision": args.precision,
        "gated": args.gated,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        **over_dense,
        "break_even_ratio": min(figures[f"break_even_d{width}"] for width in widths),
        **figures,
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
