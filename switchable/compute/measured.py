"""What is faster on this machine: one FFN of a model's own sizes, forward and backward, timed in turns.

    speed-up = median over turns of (seconds of the plain way / seconds of the other)

A stopwatch chooses only at a run's start, and what it measured or chose is kept with the run: one that goes on does
the same, on any machine. No random state is touched.

Shapes: T tokens, D d_model, F d_ff, E experts, K experts per token.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from switchable.compute.call import ExpertCall, FFNWeights
from switchable.compute.choose import expert_ffn
from switchable.compute.cpu.active.active import active
from switchable.compute.cpu.topk import top_experts
from switchable.compute.estimate import estimated_mass
from switchable.timing import Times, take_turns

CLEARLY = 1.2
"""Speed-up from which bfloat16 is taken: the rest of a step gains less than its FFNs."""
MOST_TOKENS = 1024
"""That are timed on a CPU: more take longer and tell no more. A GPU would idle with so few."""
SHARES = (0.05, 0.25)
"""Of the neurons, active on a token: between these two the time of `active` is taken for a straight line."""
PARTS = (8, 2)
"""The experts over K: between these two so is the time of a sparse FFN."""

Way = Callable[[Tensor, FFNWeights], Tensor]


class FFN(NamedTuple):
    """What is timed."""

    d_model: int
    d_ff: int
    activation: str
    gated: bool
    tokens: int
    device: str
    threads: int | None = None
    """None: as many as there are."""


class Line(NamedTuple):
    """Seconds that grow in a straight line with a share."""

    base: float
    slope: float

    def at(self, share: float) -> float:
        """Return the seconds at a share."""
        return self.base + self.slope * share


def line_through(shares: Sequence[float], seconds: Sequence[float]) -> Line:
    """Return the line through two points, which neither falls nor is below zero anywhere."""
    (low, high), (few, many) = shares, seconds
    slope = max(0.0, (many - few) / (high - low)) if high > low else 0.0
    slope = min(slope, few / low)
    return Line(few - slope * low, slope)


class Costs(NamedTuple):
    """Seconds of one FFN, forward and backward, by how it multiplies."""

    tokens: int
    dense: float
    active: Line | None
    """By the share of active neurons; None where they cannot be multiplied alone."""
    sparse: Line
    """By the share of the experts, K/E; choosing them by products in 8 bits included."""

    def active_at(self, ratio: float) -> float:
        """Return the seconds with a share of the neurons active, if those can be multiplied alone; else infinity."""
        return math.inf if self.active is None else self.active.at(ratio)

    def gain(self, ratio: float, share: float) -> float:
        """Return how many times the seconds of a sparse step a dense one takes, multiplied the faster way."""
        return min(self.dense, self.active_at(ratio)) / self.sparse.at(share)

    def told(self, ratio: float, share: float) -> str:
        """Say what each way takes."""
        ways = {"dense": self.dense, "active": self.active_at(ratio), "sparse": self.sparse.at(share)}
        return ", ".join(f"{way} {1e3 * s:.3g} ms" for way, s in ways.items() if s < math.inf)


@functools.cache
def costs(ffn: FFN, num_experts: int, precision: str, skips: bool) -> Costs:
    """Time the ways of an FFN; `skips` says whether it can multiply active neurons only."""
    ks = [max(1, num_experts // part) for part in PARTS]
    timed = []
    for k, share in zip(ks, SHARES, strict=True):
        ways = {"sparse": _sparse(ffn, num_experts, k, True), **({"active": _skipping(ffn)} if skips else {})}
        timed.append(_timed(ffn, ways, precision, share))
    dense = timed[0].median("dense")

    def line(name: str, shares: Sequence[float]) -> Line:
        return line_through(shares, [dense * times.ratio(name, "dense") for times in timed])

    active_line = line("active", SHARES) if skips else None
    return Costs(_timed_tokens(ffn), dense, active_line, line("sparse", [k / num_experts for k in ks]))


@functools.cache
def bfloat16_speedup(ffn: FFN) -> float:
    """Return how many times as fast a dense FFN is under autocast to bfloat16 as in float32."""

    def half(x_TD: Tensor, weights: FFNWeights) -> Tensor:
        with torch.autocast(ffn.device, torch.bfloat16):
            return _dense(x_TD, weights, ffn.activation)

    return _timed(ffn, {"half": half}).ratio("dense", "half")


@functools.cache
def sparse_speedup(
    ffn: FFN, num_experts: int, experts_per_token: int, precision: str, estimates: bool
) -> float:
    """Return how many times as fast a sparse FFN is as a dense one, both in `precision`.

    Choosing the experts, by the router or with `estimates` by products in 8 bits, is included.
    """
    ways = {"sparse": _sparse(ffn, num_experts, experts_per_token, estimates)}
    return _timed(ffn, ways, precision).ratio("dense", "sparse")


@functools.cache
def active_break_even(ffn: FFN, precision: str) -> float:
    """Return the share of active neurons at which multiplying only those takes a dense FFN's time; 0 if above it."""
    few, many = SHARES
    at_few, at_many = (
        _timed(ffn, {"active": _skipping(ffn)}, precision, share).ratio("active", "dense") for share in SHARES
    )
    if at_few >= 1:
        return 0.0
    return 1.0 if at_many <= at_few else min(1.0, few + (1 - at_few) / (at_many - at_few) * (many - few))


def _dense(x_TD: Tensor, weights: FFNWeights, activation: str) -> Tensor:
    return linear(weights.activations(x_TD, activation), weights.down_FD.t())


def _skipping(ffn: FFN) -> Way:
    return lambda x_TD, weights: active(x_TD, weights, ffn.activation).y_TD


def _sparse(ffn: FFN, num_experts: int, experts_per_token: int, estimates: bool) -> Way:
    router_ED = torch.linspace(-1, 1, num_experts * ffn.d_model, dtype=torch.float32, device=ffn.device)
    router_ED = (1e3 * router_ED).sin().view(num_experts, -1)

    def sparse(x_TD: Tensor, weights: FFNWeights) -> Tensor:
        if estimates:
            scores_TE = estimated_mass(x_TD, weights, ffn.activation, num_experts)
        else:
            scores_TE = linear(x_TD.detach(), router_ED).float()
        ids_TK = top_experts(scores_TE, experts_per_token)
        return expert_ffn(ExpertCall(x_TD, weights, ids_TK, num_experts, ffn.activation))

    return sparse


def _timed_tokens(ffn: FFN) -> int:
    return min(ffn.tokens, MOST_TOKENS) if ffn.device == "cpu" else ffn.tokens


def _timed(ffn: FFN, ways: Mapping[str, Way], precision: str = "float32", share: float = 0.5) -> Times:
    """Time ways against `dense` on random weights and tokens, on each of which a share of the neurons is active."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (
            (torch.randn(rows, columns, generator=generator).float() * scale).to(ffn.device).requires_grad_()
        )

    sizes = ffn.d_ff, ffn.d_model
    bias_F = torch.full((ffn.d_ff,), NormalDist().inv_cdf(share), device=ffn.device).float().requires_grad_()
    gate_FD = normal(*sizes, ffn.d_model**-0.5) if ffn.gated else None
    weights = FFNWeights(
        normal(*sizes, ffn.d_model**-0.5),
        normal(*sizes, ffn.d_ff**-0.5),
        bias_F,
        gate_FD,
        bias_F if ffn.gated else None,
    )
    x_TD, dy_TD = (normal(_timed_tokens(ffn), ffn.d_model) for _ in range(2))
    leaves = [x_TD, *dict.fromkeys(weights.tensors)]

    def step(way: Way) -> None:
        with torch.autocast(ffn.device, torch.bfloat16, enabled=precision == "bfloat16"):
            y_TD = way(x_TD, weights)
        torch.autograd.grad(y_TD, leaves, dy_TD.detach().to(y_TD.dtype))

    contenders = {"dense": lambda x, w: _dense(x, w, ffn.activation), **ways}
    wait = torch.cuda.synchronize if ffn.device == "cuda" else lambda: None
    calls = {name: functools.partial(step, way) for name, way in contenders.items()}
    with _threads(ffn.threads):
        # Others' work does not reach the time of one thread.
        alone = ffn.device == "cpu" and torch.get_num_threads() == 1
        return take_turns(calls, 0.2, turns=5, wait=wait, clock=time.process_time if alone else None)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
