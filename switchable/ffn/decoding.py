"""A few tokens without gradients: a sparse layer's whole output in one call of compiled code, prepared once.

Python takes as long as the multiplications here, all the more since weights push it out of the caches. So what was
looked up for a call serves the next ones, as long as the weights stay where they are; `PreparedLayer.fits` finds that
out and looks at as few objects as it can.

Shapes: B batch, S sequence, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from switchable.compute.cpu.decode.compiled import MOST_TOKENS, NUMBERS, prepare_call
from switchable.ffn.plain import check_plain
from switchable.ffn.ssd import SSD


def decoded(ssd: SSD, training: bool, x_BSD: Tensor) -> Tensor | None:
    """Return a sparse layer's output, bias included, from one call of compiled code; None where it does not apply.

    Then the layer computes it step by step: with gradients, many tokens, under `torch.compile` or autocast, and where a
    backend was asked for by name.
    """
    if (
        training
        or ssd.settings.config.backend != "auto"
        or x_BSD.numel() > MOST_TOKENS * ssd.d_model
        or not x_BSD.is_cpu
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return None
    cache = ssd.decode_cache
    prepared: PreparedLayer | None = cache.held
    if prepared is None or not prepared.fits(ssd, x_BSD):
        prepared = cache.held = PreparedLayer(ssd, x_BSD)
    if prepared.call is None or x_BSD.dtype not in NUMBERS:
        return None
    return prepared.call(x_BSD)


class PreparedLayer:
    """A call of a layer in sparse mode with everything looked up but its input, made for a first one."""

    __slots__ = ("call", "experts", "held", "hooks", "mass", "numbers", "tensors", "threads")

    def __init__(self, ssd: SSD, x_BSD: Tensor):
        check_plain(ssd)
        self.numbers, self.experts, self.mass = x_BSD.numel(), ssd.experts_per_token, ssd.mass
        self.threads = torch.get_num_threads()
        layer, home = ssd.holders[0], ssd.holders[-1]
        called = [ssd.router, *(module for _, module in ssd.called)]
        owners = [module._parameters for module in (*(each for _, each in ssd.projections), ssd.router)]
        self.held: list[tuple[dict[str, Any], str, object]] = []
        """Where what was found of modules and parameters is held, and no forward of a module's own."""
        for path in ssd.settings.family.projections:
            self.held += _path(home, path)
        self.held.append((layer._modules, "router", ssd.router))
        self.held += [(vars(module), "forward", None) for module in called]
        self.held += [(own, name, own[name]) for own in owners for name in own]
        self.tensors = [
            (t, t.data_ptr(), t.stride(0), t.dtype) for own in owners for t in own.values() if t is not None
        ]
        hooks = [each for module in called for each in (module._forward_pre_hooks, module._forward_hooks)]
        self.hooks = [each for each in hooks if not each]
        # A parametrised or wrapped projection keeps its weight elsewhere: what it computes is not known here.
        plain = all("weight" in owner and "bias" in owner for owner in owners)
        self.call = None
        if plain and not ssd.router._forward_pre_hooks and not ssd.router._forward_hooks:
            self.call = prepare_call(
                self.numbers // ssd.d_model,
                ssd.weights,
                (ssd.router.weight, ssd.router.bias),
                ssd.num_experts,
                ssd.experts_per_token,
                activation=ssd.settings.activation,
                mass=ssd.mass,
                start_D=ssd.down_projection.bias,
            )

    def fits(self, ssd: SSD, x_BSD: Tensor) -> bool:
        """Return whether all is as it was: x's size, K, threads, hooks, and which modules hold which numbers where."""
        if (
            x_BSD.numel() != self.numbers
            or ssd.experts_per_token != self.experts
            or ssd.mass != self.mass
            or torch.get_num_threads() != self.threads
        ):
            return False
        for hooks in self.hooks:
            if hooks:
                return False
        for names, name, thing in self.held:
            if names.get(name) is not thing:
                return False
        for tensor, address, stride, dtype in self.tensors:
            if tensor.data_ptr() != address or tensor.stride(0) != stride or tensor.dtype is not dtype:
                return False
        return True


def _path(home: nn.Module, path: str) -> Iterator[tuple[dict[str, Any], str, nn.Module]]:
    """The modules on the way to one, each with its name and what holds it."""
    for name in path.split("."):
        child = home.get_submodule(name)
        yield home._modules, name, child
        home = child
