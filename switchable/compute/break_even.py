"""From what size on a sparse FFN is faster than the dense one, on this machine: the table that `auto` asks.

    speedup = median seconds of dense / median seconds of the sparse way (router included)

Every line is one shape, measured in turns with dense (`stopwatch.measure`) unless the table knows it; `auto` is what a
sparse layer with dense fallback runs there, in inference. In training the function of the selected experts is asked
for, and the fastest sparse way is all the choice there is.

Shapes: T tokens, D d_model, F d_ff, E experts, K experts per token.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.activations import ACT2FN

from switchable.compute import autotune, stopwatch
from switchable.compute.autotune import Table
from switchable.compute.shape import Shape
from switchable.errors import InputError, divisors_near, nearest


@dataclass(frozen=True)
class Sweep:
    """The shapes to look at: every combination."""

    d_model: tuple[int, ...]
    d_ff: int | None
    """None means 4 times the width."""
    num_experts: tuple[int, ...]
    experts_per_token: int | None
    """None means 6/32 of the experts, rounded, at least 1."""
    tokens: tuple[int, ...]
    activation: str = "relu"
    dtype: str = "float32"
    device: str | None = None
    training: bool = True
    """Whether to look at training too."""

    def shapes(self) -> Iterator[Shape]:
        """Yield the shapes, inference before training for each width and number of experts.

        Raises:
            InputError: an impossible combination, an unknown activation, or CUDA where there is none.
        """
        if self.activation not in ACT2FN:
            raise InputError(
                f"activation {self.activation!r} is not known{nearest(self.activation, ACT2FN)}; use e.g. relu, relu2"
            )
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
        for d_model, experts in itertools.product(self.d_model, self.num_experts):
            d_ff = self.d_ff or 4 * d_model
            k = self.experts_per_token or max(1, round(experts * 6 / 32))
            if d_ff % experts:
                allowed = ", ".join(map(str, divisors_near(d_ff, experts)))
                raise InputError(f"num_experts={experts} does not divide d_ff={d_ff}; use one of {allowed}")
            if k > experts:
                raise InputError(
                    f"experts_per_token={k} is more than num_experts={experts}; use 1 to {experts}"
                )
            passes = (False, True) if self.training else (False,)
            for training, tokens in itertools.product(passes, self.tokens):
                dtype = getattr(torch, self.dtype)
                yield Shape(tokens, d_model, d_ff, experts, k, self.activation, dtype, device, training)


def break_even(sweep: Sweep, *, again: bool = False, check: bool = False) -> None:
    """Measure, print one line per shape, and one JSON document as the last line.

    Args:
        sweep: the shapes.
        again: measure anew what the table knows.
        check: measure a second time, for itself, what `auto` chose in inference, and report the worst choice.
    """
    shapes = list(sweep.shapes())  # all of them are checked before the first is measured
    table = autotune.table()
    print(f"{autotune.machine()['processor']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"{'D':>5} {'F':>6} {'E':>4} {'K':>3} {'T':>6} {'':8} {'dense':>10} {'sparse':>10} {'speed-up':>9}  auto"
    )
    rows = []
    for shape in shapes:
        rows.append(_row(shape, table, again, check))
        print(_line(rows[-1]), flush=True)
    where = "kept in memory only: the folder cannot be written" if table.path is None else str(table.path)
    print(f"table: {where}")
    document: dict[str, Any] = {
        "benchmark": "break_even",
        "machine": {**autotune.machine(), "threads": torch.get_num_threads()},
    }
    if check:
        worst = min(
            (row for row in rows if "auto_speedup" in row), key=lambda row: float(row["auto_speedup"])
        )
        print(f"the worst choice of auto, measured again: {worst['auto_speedup']:.2f}x dense\n{_line(worst)}")
        document["worst_auto_speedup"] = worst["auto_speedup"]
    print(json.dumps(document | {"rows": rows}))


def _row(shape: Shape, table: Table, again: bool, check: bool) -> dict[str, Any]:
    if again:
        table.forget(shape)
    times = table.lookup(shape)
    sparse = min((name for name in times if name != "dense"), key=times.__getitem__)
    values = asdict(shape) | {"dtype": str(shape.dtype).removeprefix("torch.")}
    row = values | {
        "seconds": times,
        "sparse": sparse,
        "speedup": times["dense"] / times[sparse],
        "auto": sparse if shape.training else table.choose(shape),
    }
    if check and not shape.training:
        # What is dense is the dense layer itself, whatever a second measurement might say.
        second = stopwatch.measure(shape) if row["auto"] != "dense" else times
        row["auto_speedup"] = second["dense"] / second[row["auto"]]
    return row


def _line(row: dict[str, Any]) -> str:
    sizes = "{d_model:5} {d_ff:6} {num_experts:4} {experts_per_token:3} {tokens:6}".format(**row)
    seconds = row["seconds"]
    passes = "training" if row["training"] else "infer"
    times = " ".join(f"{1e3 * seconds[name]:7.3f} ms" for name in ("dense", row["sparse"]))
    checked = f" {row['auto_speedup']:.2f}x" if "auto_speedup" in row else ""
    return f"{sizes} {passes:8} {times} {row['speedup']:8.2f}x  {row['auto']}{checked}"
