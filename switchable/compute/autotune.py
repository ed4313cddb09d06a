"""`auto`: which way of multiplying is fastest for a shape; and is it faster than dense on this machine?

Among the sparse ways on the CPU a rule decides (`shape.py`). Against dense, and between the ways on CUDA, measurements
do (`stopwatch.py`):

    choice(shape) = argmin over ways of the median time, "dense" unless a sparse way is at least 3 % faster

The first question about a shape stores the medians in a JSON file, one per machine, thread count and torch version.
After that the answer is a look-up and always the same. `switchable bench` prints the table.

Tokens are measured at powers of two. Between two of them a sparse way is chosen only if it wins at both; above
4,096 the figures of 4,096 stand. In distributed training let rank 0 resolve and broadcast the answer: ranks that
measured for themselves may disagree.

The layer asks `resolve` once per shape and runs its own dense forward where the answer is "dense". As an
implementation for `expert_ffn`, `auto` must compute the selected experts, and takes the best sparse way.
"""

from __future__ import annotations

import functools
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from switchable.compute import stopwatch
from switchable.compute.call import ExpertCall
from switchable.compute.shape import Shape, candidates

GENERATION = 4
"""Of the implementations: to be raised when one of them becomes faster or slower, so that figures are taken anew."""
MARGIN = 0.97
"""A sparse way must take at most this share of the dense time: a tie goes to dense."""


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
            self.seconds[shape.key] = stopwatch.measure(shape)
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
        sparse = candidates(shape)
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
def auto(call: ExpertCall) -> Tensor:
    """Return y_TD by the fastest sparse way."""
    from switchable.compute.choose import IMPLEMENTATIONS

    x_TD = call.x_TD
    shape = Shape(
        tokens=len(x_TD),
        d_model=x_TD.shape[1],
        d_ff=len(call.weights.up_FD),
        num_experts=call.num_experts,
        experts_per_token=call.expert_ids_TK.shape[1],
        activation=call.activation,
        dtype=_compute_dtype(x_TD),
        device=x_TD.device.type,
        training=call.learns,
    )
    return IMPLEMENTATIONS[resolve(shape, dense_allowed=False)](call)


def _compute_dtype(x_TD: Tensor) -> torch.dtype:
    device = x_TD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
