"""Training a dense FFN from its active neurons alone, against multiplying all of them.

    python -m benchmarks.active [--quick]

Forward and backward of one FFN (ReLU, d_ff = 4 D, float32) on 4,096 tokens of which each activates the given share of
the neurons, chosen at random. Both ways are timed in turns, after outputs and gradients have been found equal. The
break-even is the share at which they take the same time (a straight line through the shares measured). The last line
is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from switchable.compute.call import FFNWeights
from switchable.compute.cpu.active.active import active, has_active
from switchable.timing import take_turns

TOKENS, EXPERTS = 4096, 32
TOLERANCE = 1e-5


class Problem:
    """An FFN as GPT-2 stores it, whose bias makes a share of its neurons active on normal tokens."""

    def __init__(self, d_model: int, share: float):
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator) * scale).requires_grad_()

        d_ff = 4 * d_model
        self.x_TD, self.dy_TD = normal(TOKENS, d_model), normal(TOKENS, d_model).detach()
        self.up_DF = normal(d_model, d_ff, scale=d_model**-0.5)
        self.down_FD = normal(d_ff, d_model, scale=d_ff**-0.5)
        self.bias_F = torch.full((d_ff,), NormalDist().inv_cdf(share)).requires_grad_()
        self.weights = FFNWeights(self.up_DF.t(), self.down_FD, self.bias_F)

    def run(self, way: str) -> list[Tensor]:
        """Return the output and the gradients of input and weights."""
        leaves = [self.x_TD, self.up_DF, self.down_FD, self.bias_F]
        if way == "dense":
            y_TD = torch.addmm(self.bias_F, self.x_TD, self.up_DF).relu() @ self.down_FD
        else:
            y_TD = active(self.x_TD, self.weights, "relu", num_experts=EXPERTS).y_TD
        return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, self.dy_TD)]

    def error(self) -> float:
        """Return the largest relative difference between the two ways."""
        pairs = zip(self.run("dense"), self.run("active"), strict=True)
        return max(float((ours - dense).norm() / dense.norm()) for dense, ours in pairs)


def measure(d_model: int, shares: list[float], rounds: int) -> dict[str, float] | None:
    """Return each share's speed-up and the break-even; None if the two ways differ."""
    figures, times = {}, []
    for share in shares:
        problem = Problem(d_model, share)
        if not has_active(problem.x_TD, problem.weights, "relu") or problem.error() > TOLERANCE:
            return None
        ways = {way: partial(problem.run, way) for way in ("dense", "active")}
        seconds = take_turns(ways, 0.0, turns=rounds).medians
        times.append(seconds["active"] / seconds["dense"])
        figures[f"active_speedup_d{d_model}_{share:g}"] = seconds["dense"] / seconds["active"]
    slope, start = np.polyfit(shares, times, 1)
    return figures | {f"break_even_d{d_model}": float((1 - start) / slope)}


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two widths, few rounds (under 50 s)")
    quick = parser.parse_args().quick
    shares = [0.02, 0.05, 0.2] if quick else [0.02, 0.05, 0.1, 0.2, 0.3]
    print(f"{'D':>5} " + " ".join(f"{f'{share:.0%}':>6}" for share in shares) + "  break-even")
    figures: dict[str, float] = {}
    for d_model in (256, 512) if quick else (128, 256, 512, 768):
        found = measure(d_model, shares, rounds=5 if quick else 15)
        if found is None:
            print("the two ways differ, or this processor has no loops: nothing is reported", file=sys.stderr)
            return 1
        *speedups, break_even = found.values()
        print(f"{d_model:5} " + " ".join(f"{value:5.2f}x" for value in speedups) + f"  {break_even:9.1%}")
        figures |= found
    print(json.dumps({"benchmark": "active", "threads": torch.get_num_threads(), **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
