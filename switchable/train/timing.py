"""How much faster a sparse step is: both modes timed in turns, on the same batch, in the same process.

    step_speedup_sparse = median time of a plain dense step / median time of a sparse step

    step_speedup_active = median time of a plain dense step / median time of a dense step as the run makes it now

A *plain* dense step is one of the model without any router that multiplies every neuron, what all-dense training would
pay. Forward, backward and optimizer step are timed; the weights stay as they are (learning rate 0).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from switchable.ffn.convert import kept_modes, set_mode


def interleaved(
    contenders: Mapping[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Return the median seconds of each contender, all run once per round after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            _wait(device)
            begin = time.perf_counter()
            run()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def step_seconds(
    model: nn.Module, batch: Mapping[str, Tensor], micro_batches: int = 1, rounds: int = 9
) -> dict[str, float]:
    """Time forward + backward + optimizer step in turns.

    The kinds are `dense` (no routers), `dense_router` (they learn), `active` (as the layers are set: they learn, and
    some layers multiply only active neurons) and `sparse`.

    Args:
        model: a converted model; its weights, modes and gradients are as before afterwards.
        batch: model inputs with labels; one micro-batch.
        micro_batches: how many of them a step has, one after another.
        rounds: timed rounds.

    Returns:
        Median seconds of one step of each kind.
    """
    # A learning rate of 0 leaves the weights as they are.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def step(mode: str, *, routers: bool = True, active: bool = False) -> None:
        set_mode(model, mode)
        for layer, (learns, multiplies_active) in zip(layers, given, strict=True):
            layer.ssd.router_learns, layer.ssd.multiplies_active = (
                learns and routers,
                multiplies_active and active,
            )
        for _ in range(micro_batches):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with kept_modes(model) as layers:
        given = [(layer.ssd.router_learns, layer.ssd.multiplies_active) for layer in layers]
        model.train()
        return interleaved(
            {
                "dense": lambda: step("dense", routers=False),
                "dense_router": lambda: step("dense"),
                "active": lambda: step("dense", active=True),
                "sparse": lambda: step("sparse"),
            },
            rounds,
            next(model.parameters()).device,
        )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
