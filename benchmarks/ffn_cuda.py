"""The sparse FFN on a GPU in bfloat16: dense, our Triton path, torch's grouped product.

    python -m benchmarks.ffn_cuda [--quick] [--kernels]

Parity comes first: outputs and gradients against `eager` in float32 on the same numbers, and nothing is
reported if one contender fails. Then all contenders take turns; a figure is a median over the turns.
Training means forward and backward with gradients of input, weights, bias and gates (unit gates, as in
training), launched from Python; decoding means forward only, replayed from a CUDA graph. The router is not
included.

    share_of_ideal = speedup / (E/K)        share_of_matmul = FLOP/s / FLOP/s of an 8192³ bfloat16 product

The last line is one JSON document; `choice` in it is the table from which `auto` can choose.

Shapes: T tokens, D d_model, F d_ff, E experts, K experts per token, I = F/E neurons per expert.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from switchable.compute.call import FFNWeights
from switchable.compute.choose import ExpertCall, ExpertCompute
from switchable.compute.cuda.grouped_mm import torch_grouped_mm
from switchable.compute.cuda.triton.path import triton_atomic, triton_ffn
from switchable.compute.reference import eager

SPARSE = {"triton": triton_ffn, "triton_atomic": triton_atomic, "torch_grouped_mm": torch_grouped_mm}
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

        def leaf(t: Tensor) -> Tensor:
            return t.bfloat16().requires_grad_()

        self.shape = shape
        self.x, self.grad = leaf(normal(shape.T, shape.D)), normal(shape.T, shape.D).bfloat16()
        self.up = leaf(normal(shape.F, shape.D, scale=shape.D**-0.5))
        self.down = leaf(normal(shape.D, shape.F, scale=shape.F**-0.5))
        self.bias = leaf(normal(shape.F, scale=0.1))
        scores = normal(shape.T, shape.E) + 0.5 * normal(1, shape.E)
        self.ids = scores.topk(shape.K).indices
        self.gates = torch.ones(self.ids.shape, device=device, requires_grad=True)

    def leaves(self, *, dense: bool = False) -> list[Tensor]:
        return [self.x, self.up, self.down, self.bias] + ([] if dense else [self.gates])

    def dense(self) -> Tensor:
        return linear(linear(self.x, self.up, self.bias).relu(), self.down)

    def sparse(self, compute: ExpertCompute, *, exact: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Return the output and the tensors to differentiate by; `exact` computes in float32."""
        leaves = self.leaves()
        if exact:
            leaves = [t.detach().float().requires_grad_() for t in leaves]
        x, up, down, bias, gates = leaves
        weights = FFNWeights(up, down.t(), bias)
        return compute(ExpertCall(x, weights, self.ids, gates, self.shape.E, "relu", unit_gates=True)), leaves

    def train(self, name: str) -> list[Tensor]:
        """One forward and backward; return output and gradients."""
        if name == "dense":
            y, leaves = self.dense(), self.leaves(dense=True)
        else:
            y, leaves = self.sparse(SPARSE[name])
        return [y, *torch.autograd.grad(y, leaves, self.grad)]

    def forward(self, name: str) -> Tensor:
        with torch.no_grad():
            return self.dense() if name == "dense" else self.sparse(SPARSE[name])[0]


def parity(problem: Problem) -> dict[str, float]:
    """Return the worst relative error of each sparse contender, over its output and gradients."""
    y, leaves = problem.sparse(eager, exact=True)
    exact = [y.detach(), *torch.autograd.grad(y, leaves, problem.grad.float())]
    worst = {}
    for name in SPARSE:
        pairs = zip(problem.train(name), exact, strict=True)
        worst[name] = max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)
    return worst


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Time some calls in a row, so that launches hide behind the work before them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / repeats


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, float]:
    """Return each call's median time in ms over rounds in which every call takes its turn."""
    for call in calls.values():
        call()  # compile and tune
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(milliseconds(call, repeats))
    return {name: statistics.median(t) for name, t in times.items()}


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of a CUDA graph of the call."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def matmul_rate(rounds: int, size: int = 8192) -> float:
    """Return the FLOP/s of a large bfloat16 product: what 'the rate of this GPU' means here."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * size**3 / (interleaved({"mm": lambda: a @ b}, rounds, 5)["mm"] / 1e3)


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
        calls: dict[str, Callable[[], object]] = {name: partial(problem.train, name) for name in names}
        flops, repeats = 3 * shape.flops, 3
    else:
        calls = {name: graphed(partial(problem.forward, name)) for name in names}
        flops, repeats = shape.flops, 20
    times = interleaved(calls, rounds, repeats)
    ideal = shape.E / shape.K
    speedup = {name: times["dense"] / times[name] for name in SPARSE}
    share = {name: s / ideal for name, s in speedup.items()}
    return {
        "mode": mode,
        **asdict(shape),
        "ms": times,
        "speedup": speedup,
        "share_of_ideal": share,
        "share_of_matmul": {name: flops / (times[name] / 1e3) / rate for name in SPARSE},
        "peak_mib": {name: peak_mib(problem, name) for name in names} if mode == "train" else {},
        "parity": errors,
        "best": min(times, key=lambda name: times[name]),
    }


def print_row(row: dict[str, Any]) -> None:
    """Print one shape's contenders."""
    print(
        f"\n{row['mode']}  T={row['T']} D={row['D']} F={row['F']} E={row['E']} K={row['K']}   best: {row['best']}"
    )
    print(f"  {'':18}{'ms':>9}{'speedup':>9}{'of ideal':>10}{'of matmul':>11}{'peak MiB':>10}{'error':>9}")
    for name, ms in row["ms"].items():
        line = f"  {name:18}{ms:9.3f}"
        if name in SPARSE:
            shares = f"{row['share_of_ideal'][name]:10.0%}{row['share_of_matmul'][name]:11.0%}"
            line += f"{row['speedup'][name]:9.2f}{shares}"
        else:
            line += f"{1:9.2f}{'':21}"
        line += f"{row['peak_mib'][name]:10.0f}" if row["peak_mib"] else f"{'':10}"
        print(line + (f"{row['parity'][name]:9.0e}" if name in SPARSE else ""))


def print_kernels(shape: Shape) -> None:
    """Print where the time of one training call of the Triton path goes, and the block sizes that were chosen."""
    from switchable.compute.cuda.triton import kernels as triton_kernels

    problem = Problem(shape, "cuda")
    problem.train("triton")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(10):
            problem.train("triton")
        torch.cuda.synchronize()
    print(f"\nkernels of the Triton path, {shape}, ten calls")
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=20, max_name_column_width=60))
    for name in ("up_kernel", "hidden_grad_kernel", "down_kernel", "weight_grad_kernel"):
        for key, config in getattr(triton_kernels, name).cache.items():
            print(f"{name} {key}: {config}")


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
        "train_vs_torch_grouped_mm": first["ms"]["torch_grouped_mm"] / first["ms"]["triton"],
        "train_share_of_ideal": first["share_of_ideal"]["triton"],
        "train_share_of_matmul": first["share_of_matmul"]["triton"],
        "choice": [{k: row[k] for k in ("mode", "T", "D", "F", "E", "K", "best")} for row in rows],
        "rows": rows,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
