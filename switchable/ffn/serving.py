"""What a switchable layer does differently without gradients: a few tokens in one call, dense where that is faster.

Shapes: B batch, S sequence, D d_model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from switchable.compute.autotune import resolve
from switchable.compute.cpu.decode.compiled import MOST_TOKENS, FewCall, prepared
from switchable.compute.shape import Shape

if TYPE_CHECKING:
    from switchable.ffn.layer import SwitchableFFN

Modules = dict[str, nn.Module | None]


def few_tokens_of(layer: SwitchableFFN, x_BSD: Tensor) -> Tensor | None:
    """Return a sparse layer's output, bias included, from one call of compiled code; None where it does not apply.

    Then `layer` computes it step by step: with gradients, many tokens, real gates, under `torch.compile` or autocast,
    and where an implementation was asked for by name.
    """
    if (
        layer.training
        or layer.expert_compute != "auto"
        or layer.expert_gate != "unit"
        or x_BSD.numel() > MOST_TOKENS * layer.d_model
        or not x_BSD.is_cpu
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return None
    kept, known = layer.kept_call, layer.kept_call.known
    if known is None or not known.holds(layer, x_BSD):
        known = kept.known = Known(layer, x_BSD)
    if known.call is None or x_BSD.dtype is not torch.float32:
        return None
    return known.call(x_BSD.contiguous())


class Known:
    """What is looked up for a call of a layer, which serves the next ones as long as the weights stay where they are.

    Python takes as long as the multiplications otherwise, all the more since weights push it out of the caches: so
    `holds` looks at as few objects as it can.

    Args:
        layer: in sparse mode.
        x_BSD: the call's input.
    """

    __slots__ = ("call", "experts_per_token", "modules", "numbers", "parameters", "threads")

    def __init__(self, layer: SwitchableFFN, x_BSD: Tensor):
        self.numbers, self.experts_per_token = x_BSD.numel(), layer.experts_per_token
        self.threads = torch.get_num_threads()
        home, family = layer.holders[-1], layer.family
        self.modules = [*_steps(home, family.up), *_steps(home, family.down), *_steps(layer, "router")]
        owners = [module._parameters for module in (layer.up_projection, layer.down_projection, layer.router)]
        self.parameters = [
            (owner, name, owner[name], *_whereabouts(owner[name])) for owner in owners for name in owner
        ]
        plain = family.gate is None and all("weight" in owner and "bias" in owner for owner in owners)
        self.call = _prepared(layer, self.numbers // layer.d_model) if plain else None

    def holds(self, layer: SwitchableFFN, x_BSD: Tensor) -> bool:
        """Whether all is as it was: x's size, K, the threads, and which modules hold which numbers where."""
        if (
            x_BSD.numel() != self.numbers
            or layer.experts_per_token != self.experts_per_token
            or torch.get_num_threads() != self.threads
        ):
            return False
        for modules, name, module in self.modules:
            if modules.get(name) is not module:
                return False
        for parameters, name, tensor, address, stride, dtype in self.parameters:
            found = parameters.get(name)
            if found is not tensor or (
                found is not None
                and (found.data_ptr() != address or found.stride(0) != stride or found.dtype is not dtype)
            ):
                return False
        return True


def _steps(home: nn.Module, path: str) -> Iterator[tuple[Modules, str, nn.Module]]:
    """The modules on the way to one, each with its name and what holds it."""
    for name in path.split("."):
        child = home.get_submodule(name)
        yield home._modules, name, child
        home = child


def _whereabouts(tensor: Tensor | None) -> tuple[int, int, torch.dtype | None]:
    """Where the numbers lie, how far apart rows are, and what they are."""
    return (0, 0, None) if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.dtype)


def _prepared(layer: SwitchableFFN, tokens: int) -> FewCall | None:
    return prepared(
        tokens,
        layer.weights,
        (layer.router.weight, layer.router.bias),
        layer.num_experts,
        layer.experts_per_token,
        activation=layer.act_name,
        start_D=layer.down_projection.bias,
    )


class Kept(threading.local):
    """What a layer last looked up. Every Python thread keeps its own; copies of a layer do not."""

    known: Known | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def dense_is_faster(layer: SwitchableFFN, x_BSD: Tensor) -> bool:
    """Whether this machine's table says so; always False where gradients are wanted or the FFN is gated."""
    if torch.is_grad_enabled() or layer.gate_projection is not None:  # the table is of FFNs without a gate
        return False
    tokens, dtype, device = x_BSD.numel() // layer.d_model, x_BSD.dtype, x_BSD.device.type
    question = (tokens, layer.experts_per_token, dtype, device, torch.get_num_threads())
    if question not in layer.dense_wins:
        shape = Shape(
            tokens=tokens,
            d_model=layer.d_model,
            d_ff=layer.d_ff,
            num_experts=layer.num_experts,
            experts_per_token=layer.experts_per_token,
            activation=layer.act_name,
            dtype=dtype,
            device=device,
            training=False,
        )
        layer.dense_wins[question] = resolve(shape) == "dense"
    return layer.dense_wins[question]
