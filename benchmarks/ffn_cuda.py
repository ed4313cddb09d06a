"""The sparse FFN on a GPU in bfloat16: dense, our Triton kernels, torch's grouped product.

    python -m benchmarks.ffn_cuda [--quick] [--kernels]

Parity comes first: outputs and gradients against the reference in float32 on the same numbers; nothing is reported if
a contender fails. Then all contenders take turns, and a figure is a median over the turns. Training is forward and
backward with gradients of input, weights and bias, launched from Python. Decoding is the forward alone, replayed from
a CUDA graph. The router is not included.

    share_of_ideal = speedup / (E/K)        share_of_matmul = FLOP/s / FLOP/s of an 8192³ bfloat16 product

The last line is one JSON document; `choice` in it is what a rule for `auto` can be made of.

Shapes: T tokens, D d_model, F d_ff, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from switchable.compute.call import ExpertCall, FFNWeights
from switchable.compute.choose import expert_ffn
from switchable.timing import Times, take_turns

SPARSE = ("triton", "grouped_mm")
PARITY = 2e-2  # relative root mean square error; bfloat16 has 8 bits


@dataclass(frozen=True)
class Shape:
    T: int
    D: int
    F: int
    E: int
    K: int

    @property
    def flops(self) -> float:
        """Multiplications and additions of the sparse forward."""
        return 4.0 * self.T * self.K * (self.F // self.E) * self.D

    def __str__(self) -> str:
        return f"T={self.T} D={self.D} F={self.F} E={self.E} K={self.K}"


MAIN = Shape(16384, 2048, 8192, 32, 8)
TRAINING = [
    MAIN,
    Shape(16384, 768, 3072, 32, 6),
    Shape(16384, 1024, 4096, 32, 6),
    Shape(4096, 2048, 8192, 32, 8),
    Shape(16384, 2048, 8192, 64, 16),
    Shape(16384, 4096, 16384, 32, 8),
]
DECODING = [Shape(t, 2048, 8192, 32, 8) for t in (1, 4, 16, 64)]


class Problem:
    """Random weights stored as in nn.Linear, tokens, and a routing as uneven as a trained router's."""

    def __init__(self, shape: Shape, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(size, generator=generator, device=device) * scale

        self.shape = shape
        self.grad = normal(shape.T, shape.D).bfloat16()
        numbers = (
            normal(shape.T, shape.D),
            normal(shape.F, shape.D, scale=shape.D**-0.5),
            normal(shape.D, shape.F, scale=shape.F**-0.5),
            normal(shape.F, scale=0.1),
        )
        self.leaves = [tensor.bfloat16().requires_grad_() for tensor in numbers]  # x, up, down, bias
        scores = normal(shape.T, shape.E) + 0.5 * normal(1, shape.E)
        self.ids = scores.topk(shape.K).indices

    def output(self, name: str, leaves: list[Tensor]) -> Tensor:
        """Return y_TD as a contender computes it."""
        x, up, down, bias = leaves
        if name == "dense":
            return linear(linear(x, up, bias).relu(), down)
        call = ExpertCall(x, FFNWeights(up, down.t(), bias), self.ids, self.shape.E, "relu")
        return expert_ffn(call, name)

    def train(self, name: str, *, exact: bool = False) -> list[Tensor]:
        """One forward and backward; return output and gradients. `exact` computes in float32."""
        leaves = [leaf.detach().float().requires_grad_() for leaf in self.leaves] if exact else self.leaves
        y_TD = self.output(name, leaves)
        return [y_TD, *torch.autograd.grad(y_TD, leaves, self.grad.to(y_TD.dtype))]

    @torch.no_grad()
    def forward(self, name: str) -> Tensor:
        """Return y_TD, to be differentiated by nothing."""
        return self.output(name, self.leaves)


def parity(problem: Problem) -> dict[str, float]:
    """Return the worst relative error of each sparse contender, over its output and gradients."""
    exact = problem.train("reference", exact=True)
    worst = {}
    for name in SPARSE:
        pairs = zip(problem.train(name), exact, strict=True)
        worst[name] = max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)
    return worst


def timed(calls: dict[str, Callable[[], object]], rounds: int, repeat: int) -> Times:
    """Time calls in turns; so many in a row that launches hide behind the work before them."""
    return take_turns(calls, 0.0, repeat, rounds, wait=torch.cuda.synchronize)


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of a CUDA graph of the call."""
    for _ in range(3):  # compile and tune, which a graph cannot hold
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def matmul_rate(rounds: int, size: int = 8192) -> float:
    """Return the FLOP/s of a large bfloat16 product: what 'the rate of this GPU' means here."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * size**3 / timed({"mm": lambda: a @ b}, rounds, 5).median("mm")


def peak_mib(problem: Problem, name: str) -> float:
    """Return the memory of one forward and backward beyond what was there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    problem.train(name)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(shape: Shape, mode: str, rate: float, rounds: int) -> dict[str, Any]:
    """Return one row of the report."""
    problem = Problem(shape, "cuda")
    errors = parity(problem)
    failed = [f"{name} ({error:.1e})" for name, error in errors.items() if not error < PARITY]
    if failed:
        sys.exit(
            f"parity failed at {shape}: {', '.join(failed)}, allowed is {PARITY:.0e}; nothing is reported"
        )
    names = ["dense", *SPARSE]
    if mode == "train":
        times = timed({name: partial(problem.train, name) for name in names}, rounds, 3)
        flops = 3 * shape.flops
    else:
        times = timed({name: graphed(partial(problem.forward, name)) for name in names}, rounds, 100)
        flops = shape.flops
    speedup = {name: times.ratio("dense", name) for name in SPARSE}
    return {
        "mode": mode,
        **asdict(shape),
        "ms": {name: 1e3 * seconds for name, seconds in times.medians.items()},
        "speedup": speedup,
        "share_of_ideal": {name: ratio * shape.K / shape.E for name, ratio in speedup.items()},
        "share_of_matmul": {name: flops / times.median(name) / rate for name in SPARSE},
        "peak_mib": {name: peak_mib(problem, name) for name in names} if mode == "train" else {},
        "parity": errors,
        "best": min(names, key=times.median),
    }


def print_row(row: dict[str, Any]) -> None:
    """Print one shape's contenders."""
    shape = Shape(*(row[size] for size in "TDFEK"))
    print(f"\n{row['mode']}  {shape}   best: {row['best']}")
    print(f"  {'':12}{'ms':>9}{'speedup':>9}{'of ideal':>10}{'of matmul':>11}{'peak MiB':>10}{'error':>9}")
    for name, ms in row["ms"].items():
        line = f"  {name:12}{ms:9.3f}{row['speedup'].get(name, 1):9.2f}"
        for key, form in (("share_of_ideal", "10.0%"), ("share_of_matmul", "11.0%"), ("peak_mib", "10.0f")):
            line += format(row[key][name], form) if name in row[key] else " " * int(form.split(".")[0])
        print(line + (f"{row['parity'][name]:9.0e}" if name in SPARSE else ""))


def print_kernels(shape: Shape) -> None:
    """Print where the time of training with the Triton kernels goes, and the block sizes that were chosen."""
    from switchable.compute.cuda.triton import kernels

    problem = Problem(shape, "cuda")
    problem.train("triton")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            problem.train("triton")
        torch.cuda.synchronize()
    print(f"\nkernels of triton, {shape}, ten calls")
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=20, max_name_column_width=60))
    for kernel in (kernels.expert_kernel, kernels.weight_grad_kernel):
        for key, config in kernel.cache.items():
            print(f"{kernel.base_fn.__name__} {key}: {config}")


def main() -> None:
    """Measure, print a table, end in one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first shape and decoding one token only")
    parser.add_argument("--kernels", action="store_true", help="also print the time of every kernel")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"benchmarks.ffn_cuda needs a CUDA device; torch {torch.__version__} sees none", file=sys.stderr
        )
        sys.exit(2)
    rounds = 10 if arguments.quick else 30
    rate = matmul_rate(rounds)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {rate / 1e12:.0f} TFLOP/s in bfloat16")
    rows = []
    for mode, shapes in (("train", TRAINING), ("decode", DECODING)):
        for shape in shapes[:1] if arguments.quick else shapes:
            rows.append(measure(shape, mode, rate, rounds))
            print_row(rows[-1])
            torch.cuda.empty_cache()
    if arguments.kernels:
        print_kernels(MAIN)
    first = rows[0]
    report = {
        "benchmark": "ffn_cuda",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dtype": "bfloat16",
        "matmul_tflops": rate / 1e12,
        "train_speedup": first["speedup"]["triton"],
        "train_vs_torch_grouped_mm": first["ms"]["grouped_mm"] / first["ms"]["triton"],
        "train_share_of_ideal": first["share_of_ideal"]["triton"],
        "train_share_of_matmul": first["share_of_matmul"]["triton"],
        "choice": [{k: row[k] for k in ("mode", "T", "D", "F", "E", "K", "best")} for row in rows],
        "rows": rows,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
