"""How much faster a sparse step is: both modes timed in turns, on the same batch, in the same process.

    step_speedup_sparse = median time of a plain dense step / median time of a sparse step

    step_speedup_active = median time of a plain dense step / median time of a dense step as the run makes it now

A *plain* dense step is one of the model without any router that multiplies every neuron, what all-dense training would
pay. Forward, backward and optimizer step are timed; the weights stay as they are (learning rate 0).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from switchable.ffn.convert import kept_modes, set_mode
from switchable.timing import take_turns


def step_seconds(
    model: nn.Module, batch: Mapping[str, Tensor], micro_batches: int = 1, rounds: int = 9
) -> dict[str, float]:
    """Time forward + backward + optimizer step in turns.

    The kinds are `dense` (no routers), `dense_router` (they learn), `active` (as the layers are set: they learn, and
    some layers multiply only active neurons) and, if a layer takes part, `sparse`.

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
        device = next(model.parameters()).device
        contenders = {
            "dense": lambda: step("dense", routers=False),
            "dense_router": lambda: step("dense"),
            "active": lambda: step("dense", active=True),
        }
        if any(layer.ssd.takes_part for layer in layers):
            contenders["sparse"] = lambda: step("sparse")
        return take_turns(contenders, 0.0, turns=rounds, wait=lambda: _wait(device)).medians


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
