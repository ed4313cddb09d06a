"""How fast a model's own FFNs multiply on this machine: dense against sparse, in turns, router included.

    speedup = median over turns of (seconds of a dense layer / seconds of the sparse one)

Dense is the plain layer: no router, every neuron. Each layer is timed alone, on random tokens, in a run's precision.
With few tokens the weights of other layers are not read in between, so they may come from the cache;
`python -m benchmarks.decode` times whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from switchable.ffn.convert import check_sparse, kept_modes, layers_of, set_mode, why_dense
from switchable.ffn.layer import SwitchableFFN
from switchable.infer.precision import chosen_precision, multiplying_in
from switchable.options import refuse_more_than_memory
from switchable.timing import processor, take_turns


def measure(
    model: nn.Module, tokens: Sequence[int], experts_per_token: int | None, training: bool, seconds: float,
    precision: str | None = None, show: Callable[[str], object] = lambda _line: None,
) -> dict[str, Any]:  # fmt: skip
    """Time every layer of a converted model on the CPU that takes part in sparse mode; the model's modes are kept.

    `tokens` are numbers of tokens at once, `seconds` are spent on each of them in each layer, and `show` is given each
    line of the table. K is `experts_per_token`, or each layer's own. Without `training`, which times forward and
    backward, it is the forward alone, without gradients. `precision` is that of the products; None takes the weights'.
    Raises InputError if no layer takes part in sparse mode, or K is impossible.
    """
    check_sparse(model)
    layers = [layer for layer in layers_of(model) if layer.ssd.takes_part]
    widest = max(layer.ssd.d_ff for layer in layers)
    most = max(tokens)
    refuse_more_than_memory(4 * most * widest, f"a layer of {widest} neurons with {most} tokens")
    precision = chosen_precision(model, precision)
    machine = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    show("{processor}, {threads} threads, torch {torch}".format_map(machine))
    show(f"{precision}, forward{' and backward' * training}")
    if why := why_dense(model):
        show(f"{why}: not timed")
    show(f"{'layer':40} {'K':>5} {'tokens':>7} {'dense':>11} {'sparse':>11} {'speed-up':>9}")
    rows = []
    with kept_modes(model), multiplying_in(model, precision):
        set_mode(model, "dense", experts_per_token)
        model.train(training)
        for layer in layers:
            for number in tokens:
                rows.append(_row(layer, number, training, seconds))
                show(line(rows[-1]))
    return {"machine": machine, "precision": precision, "training": training, "layers": rows}


def _row(layer: SwitchableFFN, tokens: int, training: bool, seconds: float) -> dict[str, Any]:
    weight = layer.ssd.up_projection.weight
    x_BSD = torch.randn(1, tokens, layer.ssd.d_model, generator=torch.Generator().manual_seed(0))
    x_BSD = x_BSD.to(weight.dtype).requires_grad_(training)
    learns = layer.ssd.router_learns

    def multiply(mode: str) -> None:
        layer.ssd.mode = mode
        layer.ssd.router_learns = learns and mode == "sparse"
        with torch.set_grad_enabled(training):
            y_BSD = layer(x_BSD)
        if training:
            torch.autograd.backward(y_BSD, torch.ones_like(y_BSD))
            x_BSD.grad = None
            for holder in layer.ssd.holders:  # adding gradients up would be timed with them
                holder.zero_grad(set_to_none=True)

    times = take_turns({mode: partial(multiply, mode) for mode in ("dense", "sparse")}, seconds)
    layer.ssd.router_learns = learns
    return {
        "layer": layer.ssd.name,
        "experts_per_token": layer.ssd.experts_per_token,
        "num_experts": layer.ssd.num_experts,
        "tokens": tokens,
        "seconds_dense": times.median("dense"),
        "seconds_sparse": times.median("sparse"),
        "speedup": times.ratio("dense", "sparse"),
    }


def line(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    dense, sparse = (f"{1e3 * row[f'seconds_{mode}']:8.3f} ms" for mode in ("dense", "sparse"))
    return (
        f"{row['layer'][-40:]:40} {row['experts_per_token']:>5} {row['tokens']:>7} {dense:>11} {sparse:>11} "
        f"{row['speedup']:8.2f}x"
    )
