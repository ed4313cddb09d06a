"""`auto`: which way of multiplying is fastest for a shape; and is it faster than dense on this machine?

Among the sparse ways on the CPU a rule decides: a training run that is resumed must get the same bits, so a stopwatch
must not choose. `decode` for a few tokens without gradients; else `fused`, from 64 tokens on and for experts that are
not so large that a matrix library does as well; else `sorted` where the products are large enough to be worth its
calls, N · D · I multiplications of an expert with its N tokens; else `masked`.

Against dense, and between the ways on CUDA, measurements decide:

    choice(shape) = argmin over ways of the median time, "dense" unless a sparse way is at least 3 % faster

The first question about a shape times the dense layer and the candidates in turns (interleaved, so that a slow phase
of the machine hits all of them) and stores the medians in a JSON file, one per machine, thread count and torch
version. After that the answer is a look-up and always the same. `switchable bench` prints the table.

Tokens are measured at powers of two. Between two of them a sparse way is chosen only if it wins at both; above
4,096 the figures of 4,096 stand. In distributed training let rank 0 resolve and broadcast the answer: ranks that
measured for themselves may disagree.

The layer asks `resolve` once per shape and runs its own dense forward where the answer is "dense". As an
implementation for `expert_ffn`, `auto` must compute the selected experts, and takes the best sparse way.

Shapes: T tokens, D d_model, E experts, F d_ff, K experts per token.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from switchable.ffn.experts.few import MOST_TOKENS, few_tokens, serves
from switchable.ffn.experts.fused import has_loops
from switchable.ffn.experts.selection import top_experts
from switchable.ffn.experts.weights import FFNWeights

GENERATION = 3
"""Of the implementations: to be raised when one of them becomes faster or slower, so that figures are taken anew."""
CUDA_CANDIDATES = ("triton", "torch_grouped_mm")
"""Sparse ways that are timed on CUDA."""
FEWEST_FUSED = 64
"""Tokens from which `fused` is worth the reordering of its weights."""
THICK = 256
"""Neurons of an expert from which `sorted` is faster than `fused`; measured with D=768, E=8."""
WORTH_SORTING = 700_000
"""N · D · I, multiplications of an expert's product (N tokens of it on average), from which `sorted` beats `masked`.
Measured on 2 cores for D 128 to 1,024, E 8 to 64: the break-even lay between 500,000 and 800,000 from 16 tokens on."""
MARGIN = 0.97
"""A sparse way must take at most this share of the dense time: a tie goes to dense."""
LARGEST = 4096
"""Tokens; ratios no longer change above."""
LARGEST_DECODE = 16
"""Tokens; above, `decode` is not asked where it has no compiled code."""
FEW_TOKENS = 64
"""Up to so many, reading the weights is most of the time, and they must not come from the cache."""
CACHE_BYTES = 64 * 2**20
"""Weights to go through before the first ones are used again."""
SECONDS = 0.3
"""To spend on each candidate; at least three rounds are timed."""


@dataclass(frozen=True)
class Shape:
    """One problem."""

    tokens: int
    d_model: int
    d_ff: int
    num_experts: int
    experts_per_token: int
    activation: str = "relu"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    training: bool = True
    """Forward and backward; else the forward alone, without gradients."""

    @property
    def key(self) -> str:
        """Its name in the table."""
        passes = "train" if self.training else "infer"
        return (
            f"{self.device} {str(self.dtype).removeprefix('torch.')} {self.activation} {passes} D={self.d_model} "
            f"F={self.d_ff} E={self.num_experts} K={self.experts_per_token} T={self.tokens}"
        )

    @property
    def measured_at(self) -> tuple[Shape, ...]:
        """The same with the one or two powers of two next to its tokens."""
        exponent = max(min(self.tokens, LARGEST), 1).bit_length() - 1
        above = min(2**exponent if self.tokens == 2**exponent else 2 ** (exponent + 1), LARGEST)
        return tuple(replace(self, tokens=tokens) for tokens in sorted({2**exponent, above}))


@dataclass
class Table:
    """Median seconds by shape and way, kept in a file."""

    path: Path | None
    """None: in memory only."""
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: dict[tuple[Shape, bool], str] = field(default_factory=dict)
    """What `choose` has said in this process."""

    @classmethod
    def load(cls, path: Path) -> Table:
        """Read a table; a file that is missing or damaged counts as empty."""
        try:
            seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
            return cls(path, {key: _checked(times) for key, times in seconds.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls(path)

    def lookup(self, shape: Shape) -> dict[str, float]:
        """Return the medians of a shape, measuring and storing them if they are not known."""
        if shape.key not in self.seconds:
            self.seconds[shape.key] = measure(shape)
            self.save()
        return self.seconds[shape.key]

    def forget(self, shape: Shape) -> None:
        """Measure a shape anew when it is next asked for."""
        self.seconds.pop(shape.key, None)
        self.answers.clear()

    def save(self) -> None:
        """Write the file in one step; where that is impossible the table lives as long as the process."""
        if self.path is None:
            return
        known = {**Table.load(self.path).seconds, **self.seconds}
        document = {"machine": {**machine(), "threads": torch.get_num_threads()}, "seconds": known}
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            partial.replace(self.path)
        except OSError:
            self.path = None

    def choose(self, shape: Shape, *, dense_allowed: bool = True) -> str:
        """Return the name of the fastest way; it is sparse only where it wins at all neighbouring sizes."""
        sparse = _candidates(shape)
        if not dense_allowed and len(sparse) == 1:
            return sparse[0]  # nothing to choose from, nothing to measure
        if (shape, dense_allowed) not in self.answers:
            measured = [self.lookup(neighbour) for neighbour in shape.measured_at]
            self.answers[shape, dense_allowed] = _fastest(measured, dense_allowed)
        return self.answers[shape, dense_allowed]


def _checked(times: dict[str, float]) -> dict[str, float]:
    """Return an entry of the file if it is one, or raise what `Table.load` expects."""
    seconds = {name: float(value) for name, value in times.items()}
    if not seconds["dense"] > 0:
        raise ValueError("no time of the dense layer")
    return seconds


def _fastest(measured: list[dict[str, float]], dense_allowed: bool) -> str:
    sparse = set.intersection(*({name for name in times if name != "dense"} for times in measured))
    worst = {name: max(times[name] / times["dense"] for times in measured) for name in sorted(sparse)}
    best = min(worst, key=worst.__getitem__, default="eager")
    return "dense" if dense_allowed and worst.get(best, 1.0) > MARGIN else best


@functools.cache
def machine() -> dict[str, str]:
    """Return what the figures depend on besides the shape and the number of threads."""
    names = [platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("model name")][:1]
    else:
        names.append(platform.processor())
    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    return {"processor": " ".join(name for name in names if name), "torch": torch.__version__}


def cache_path(folder: str | None, threads: int) -> Path:
    """Return this machine's file in `folder`/switchable; None means `~/.cache`."""
    name = "-".join([*machine().values(), f"{threads} threads"])
    name = "".join(c if c.isalnum() or c in ".-+" else "_" for c in name)
    return (
        (Path(folder) if folder else Path.home() / ".cache")
        / "switchable"
        / f"experts-{GENERATION}-{name}.json"
    )


@functools.cache
def _table(folder: str | None, threads: int) -> Table:
    return Table.load(cache_path(folder, threads))


def table() -> Table:
    """Return this machine's table, kept in `$XDG_CACHE_HOME/switchable` or `~/.cache/switchable`."""
    return _table(os.environ.get("XDG_CACHE_HOME"), torch.get_num_threads())


def resolve(shape: Shape, *, dense_allowed: bool = True) -> str:
    """Return an implementation's name, or "dense" where the dense layer is at least as fast.

    The first call for a shape takes as long as the measurement (seconds for large shapes); later ones are look-ups.
    """
    return table().choose(shape, dense_allowed=dense_allowed)


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def auto(
    x_TD: Tensor,
    weights: FFNWeights,
    expert_ids_TK: Tensor,
    gates_TK: Tensor | None,
    *,
    num_experts: int,
    activation: str,
    unit_gates: bool = False,
) -> Tensor:
    """Return y_TD by the fastest sparse way (see `expert_ffn` for the arguments)."""
    from switchable.ffn.experts import IMPLEMENTATIONS

    tensors = (x_TD, weights.up_FD, weights.down_FD, gates_TK)
    shape = Shape(
        tokens=len(x_TD),
        d_model=x_TD.shape[1],
        d_ff=len(weights.up_FD),
        num_experts=num_experts,
        experts_per_token=expert_ids_TK.shape[1],
        activation=activation,
        dtype=_compute_dtype(x_TD),
        device=x_TD.device.type,
        training=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors),
    )
    compute = IMPLEMENTATIONS[resolve(shape, dense_allowed=False)]
    return compute(
        x_TD,
        weights,
        expert_ids_TK,
        gates_TK,
        num_experts=num_experts,
        activation=activation,
        unit_gates=unit_gates,
    )


def _compute_dtype(x_TD: Tensor) -> torch.dtype:
    device = x_TD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype


def measure(shape: Shape) -> dict[str, float]:
    """Time dense and the candidates in turns, on random weights and tokens; return median seconds by name."""
    with torch.inference_mode(False), torch.autocast(shape.device, enabled=False):
        contenders = _contenders(shape)
        start = time.perf_counter()
        for calls in contenders.values():
            _seconds(calls, shape)
        rounds = max(3, min(25, int(SECONDS * len(contenders) / (time.perf_counter() - start))))
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, calls in contenders.items():
                times[name].append(_seconds(calls, shape))
        return {name: statistics.median(values) for name, values in times.items()}


@dataclass
class _Layer:
    """Random weights of one layer, stored neuron by neuron as `convert` leaves them, and a batch."""

    shape: Shape
    generator: torch.Generator

    def __post_init__(self) -> None:
        T, D, F, E = self.shape.tokens, self.shape.d_model, self.shape.d_ff, self.shape.num_experts
        self.x_TD, self.up_FD, self.down_FD = self._normal(T, D), self._normal(F, D), self._normal(F, D)
        self.bias_F, self.router_ED, self.router_E = self._normal(F), self._normal(E, D), self._normal(E)

    def _normal(self, *size: int) -> Tensor:
        values = torch.randn(*size, generator=self.generator).to(self.shape.device, self.shape.dtype)
        return values.requires_grad_(self.shape.training)

    def dense(self) -> Tensor:
        hidden_TF: Tensor = ACT2FN[self.shape.activation](linear(self.x_TD, self.up_FD, self.bias_F))
        return linear(hidden_TF, self.down_FD.t())

    def sparse(self, implementation: str) -> Tensor:
        """With the router, since dense needs none."""
        from switchable.ffn.experts import expert_ffn

        weights = FFNWeights(self.up_FD, self.down_FD, self.bias_F)
        if implementation == "decode":
            router = (self.router_ED, self.router_E)
            y_TD: Tensor | None = few_tokens(
                self.x_TD,
                weights,
                router,
                self.shape.num_experts,
                self.shape.experts_per_token,
                activation=self.shape.activation,
            )
            if y_TD is not None:
                return y_TD
        scores_TE = linear(self.x_TD.detach(), self.router_ED, self.router_E)
        return expert_ffn(
            self.x_TD,
            weights,
            top_experts(scores_TE, self.shape.experts_per_token),
            None,
            num_experts=self.shape.num_experts,
            activation=self.shape.activation,
            implementation=implementation,
        )


def _contenders(shape: Shape) -> dict[str, list[Callable[[], Tensor]]]:
    """The calls to time, by name: one per layer, so that a few tokens find the weights outside the cache."""
    layer_bytes = 2 * shape.d_model * shape.d_ff * shape.dtype.itemsize
    few = shape.tokens <= FEW_TOKENS and not shape.training
    generator = torch.Generator().manual_seed(0)
    layers = [
        _Layer(shape, generator) for _ in range(max(2, min(64, CACHE_BYTES // layer_bytes)) if few else 1)
    ]
    contenders: dict[str, list[Callable[[], Tensor]]] = {"dense": [layer.dense for layer in layers]}
    for name in _candidates(shape):
        contenders[name] = [functools.partial(layer.sparse, name) for layer in layers]
    return contenders


def _candidates(shape: Shape) -> tuple[str, ...]:
    """The sparse ways that come into question for a shape on its device."""
    if shape.device == "cuda":
        return CUDA_CANDIDATES
    compiled = serves(shape.d_model, shape.num_experts, shape.dtype, shape.activation)
    if not shape.training and shape.tokens <= (MOST_TOKENS if compiled else LARGEST_DECODE):
        return ("decode",)
    neurons = shape.d_ff // shape.num_experts
    if (
        shape.tokens >= FEWEST_FUSED
        and neurons < THICK
        and has_loops(shape.d_model, neurons, shape.dtype, shape.activation)
    ):
        return ("fused",)
    mean_rows = shape.tokens * shape.experts_per_token / shape.num_experts
    work = mean_rows * shape.d_model * neurons
    return ("sorted",) if work >= WORTH_SORTING else ("masked",)


def _seconds(calls: list[Callable[[], Tensor]], shape: Shape) -> float:
    """Seconds per call; the device has finished at both ends."""
    with torch.set_grad_enabled(shape.training):
        _wait(shape)
        start = time.perf_counter()
        for call in calls:
            y_TD = call()
            if shape.training:
                torch.autograd.backward(y_TD, torch.ones_like(y_TD))
        _wait(shape)
        return (time.perf_counter() - start) / len(calls)


def _wait(shape: Shape) -> None:
    if shape.device == "cuda":
        torch.cuda.synchronize()
