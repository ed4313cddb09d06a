"""Without gradients: a sparse layer's whole output in one call of compiled code, prepared once.

With few tokens Python takes as long as the multiplications, all the more since weights push it out of the caches. So
what was looked up for a call serves the next ones, as long as the weights stay where they are; `PreparedLayer.fits`
finds that out and looks at as few objects as it can.

Shapes: B batch, S sequence, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from switchable.compute.call import ExpertCall
from switchable.compute.cpu.decode.compiled import FEW_TOKENS, DecodeCall, prepare_call
from switchable.compute.cpu.decode.rows import NUMBERS
from switchable.compute.cpu.experts.fused import prepare_prefill
from switchable.compute.cpu.experts.prefill import Prefill
from switchable.ffn.plain import check_plain
from switchable.ffn.ssd import SSD


def in_one_call(ssd: SSD, training: bool, x_BSD: Tensor) -> Tensor | None:
    """Return a sparse layer's output, bias included, from one call of compiled code; None where it does not apply.

    Then the layer computes it step by step: with gradients, under `torch.compile` or autocast, and where a backend was
    asked for by name.
    """
    if (
        training
        or ssd.settings.config.backend != "auto"
        or x_BSD.dtype not in NUMBERS
        or not x_BSD.is_cpu
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return None
    cache = ssd.call_cache
    prepared: PreparedLayer | None = cache.held
    if prepared is None or not prepared.fits(ssd):
        prepared = cache.held = PreparedLayer(ssd)
    return prepared(ssd, x_BSD) if prepared.plain else None


class PreparedLayer:
    """Calls of a layer in sparse mode with everything looked up but their input."""

    __slots__ = ("calls", "experts", "held", "hooks", "mass", "plain", "tensors")

    def __init__(self, ssd: SSD):
        check_plain(ssd)
        self.experts, self.mass = ssd.experts_per_token, ssd.mass
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
        self.plain = all("weight" in owner and "bias" in owner for owner in owners)
        self.plain = self.plain and not ssd.router._forward_pre_hooks and not ssd.router._forward_hooks
        self.calls: dict[str, tuple[object, DecodeCall | Prefill | None]] = {}
        """Those last prepared, for few tokens and for many, after what they are for."""

    def fits(self, ssd: SSD) -> bool:
        """Return whether all is as it was: K, hooks, and which modules hold which numbers where."""
        if ssd.experts_per_token != self.experts or ssd.mass != self.mass:
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

    def __call__(self, ssd: SSD, x_BSD: Tensor) -> Tensor | None:
        """Return the output; None if there is no code for it."""
        tokens, is_few = x_BSD.numel() // ssd.d_model, x_BSD.numel() <= FEW_TOKENS * ssd.d_model
        kind, purpose = ("few", (tokens, torch.get_num_threads())) if is_few else ("many", x_BSD.dtype)
        known = self.calls.get(kind)
        if known is None or known[0] != purpose:
            known = self.calls[kind] = (purpose, _few(ssd, tokens) if is_few else _many(ssd, x_BSD))
        if (call := known[1]) is None:
            return None
        if is_few:
            return call(x_BSD)
        return call(x_BSD.reshape(-1, ssd.d_model).contiguous()).view(x_BSD.shape)


def _few(ssd: SSD, tokens: int) -> DecodeCall | None:
    return prepare_call(
        tokens,
        ssd.weights,
        (ssd.router.weight, ssd.router.bias),
        ssd.num_experts,
        ssd.experts_per_token,
        activation=ssd.settings.activation,
        mass=ssd.mass,
        start_D=ssd.down_projection.bias,
    )


def _many(ssd: SSD, x_BSD: Tensor) -> Prefill | None:
    no_ids_TK = torch.empty(0, ssd.experts_per_token, dtype=torch.int64)
    x_TD = x_BSD.reshape(-1, ssd.d_model)
    call = ExpertCall(x_TD, ssd.weights, no_ids_TK, ssd.num_experts, ssd.settings.activation, ssd.mass < 1)
    router = ssd.router.weight, ssd.router.bias
    return prepare_prefill(call, router, ssd.down_projection.bias, mass=ssd.mass)


def _path(home: nn.Module, path: str) -> Iterator[tuple[dict[str, Any], str, nn.Module]]:
    """The modules on the way to one, each with its name and what holds it."""
    for name in path.split("."):
        child = home.get_submodule(name)
        yield home._modules, name, child
        home = child
