"""What a switchable FFN does on tokens, each measure defined once: for the monitor, the study and `convert`.

    activation ratio    share of (token, neuron) pairs with a_i(t) ≠ 0
    dead, always on     share of neurons that fire on no token, and on every token
    mass by k           Σ mass of k experts / Σ mass of all,   mass_e = Σ_{i in e} |a_i| ‖down_i‖,
                        the k that the router puts first, or the best k of each token; k = 1, 2, ..., E
    load imbalance      busiest expert's share of the choices x E (1 = all alike)
    pattern similarity  Jaccard index |A ∩ B| / |A ∪ B| of the active neurons now and last time, mean over the tokens
    routing changed     share of tokens whose set of K experts is not last time's; where K is last time's

Sums are kept in float64, and nothing in them grows with the tokens. Patterns have a bit for each neuron of each token,
in the neurons' first order (`layer.ssd.neuron_ids_F`): two of them can be compared, whoever moved neurons in between.

Shapes: T tokens, D d_model, F d_ff, E experts, K experts per token, W = ceil(F/8) bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from switchable.compute.estimate import expert_mass
from switchable.ffn.convert import in_mode, layers_of
from switchable.ffn.layer import SwitchableFFN
from switchable.ranks import reshard

Batch = Mapping[str, Tensor]
"""Model inputs by their names."""
Inputs = Batch | Tensor
"""The same, or the first one alone: `input_ids`, nanoGPT's `idx`, `pixel_values`."""


Observer = Callable[[SwitchableFFN, Tensor], object]
"""Is shown a layer and its input, [B, S, D] or [T, D], a batch of the probe at a time."""
Precision = Callable[[], AbstractContextManager[Any]]
"""The context in which a probe is multiplied, as a loop's autocast."""


class LayerSums:
    """What one layer does with its own K, summed over tokens; the module's text says what each measure is."""

    def __init__(self, layer: SwitchableFFN) -> None:
        ssd = layer.ssd
        self.chosen, self.tokens, self.pairs = ssd.experts_per_token, 0, 0
        device = ssd.up_projection.weight.device  # no host sync before somebody asks
        self.fired_F = torch.zeros(ssd.d_ff, dtype=torch.int64, device=device)
        self.load_E = torch.zeros(ssd.num_experts, dtype=torch.int64, device=device)
        self._router_E = torch.zeros(ssd.num_experts, dtype=torch.float64, device=device)
        self._best_E = torch.zeros_like(self._router_E)

    def add(self, layer: SwitchableFFN, x: Tensor) -> None:
        """Take in the layer's input, as an `Observer`."""
        x_TD = x.reshape(-1, layer.ssd.d_model)
        hidden_TF = layer.ssd.activations(x_TD)
        self.add_tokens(layer, x_TD, hidden_TF, hidden_TF != 0)

    def add_tokens(self, layer: SwitchableFFN, x_TD: Tensor, hidden_TF: Tensor, active_TF: Tensor) -> Tensor:
        """Take in tokens, their activations and which of these count as active; return the experts chosen, route_TK."""
        ssd = layer.ssd
        mass_TE = expert_mass(hidden_TF, ssd.weights.down_FD, ssd.num_experts)
        order_TE = layer.router(x_TD).argsort(dim=-1, descending=True)
        route_TK: Tensor = order_TE[:, : self.chosen]
        self._router_E += mass_TE.gather(1, order_TE).sum(dim=0, dtype=torch.float64)
        self._best_E += mass_TE.sort(dim=1, descending=True).values.sum(dim=0, dtype=torch.float64)
        self.load_E += torch.bincount(route_TK.reshape(-1), minlength=ssd.num_experts)
        self.fired_F += active_TF.sum(dim=0)
        self.tokens += len(x_TD)
        self.pairs += active_TF.numel()
        return route_TK

    @property
    def activation_ratio(self) -> float:
        assert self.tokens, "the probe never reached the layer"
        return float(self.fired_F.sum()) / self.pairs

    @property
    def dead(self) -> float:
        return float((self.fired_F == 0).double().mean())

    @property
    def always_on(self) -> float:
        return float((self.fired_F == self.tokens).double().mean())

    @property
    def mass_router(self) -> list[float]:
        """Share of the activation mass in the router's first 1, 2, ..., E experts."""
        return self._shares(self._router_E)

    @property
    def mass_best(self) -> list[float]:
        """Share of the activation mass in the best 1, 2, ..., E experts of each token."""
        return self._shares(self._best_E)

    @property
    def mass_caught(self) -> float:
        return self.mass_router[self.chosen - 1]

    @property
    def mass_best_k(self) -> float:
        return self.mass_best[self.chosen - 1]

    def _shares(self, mass_E: Tensor) -> list[float]:
        total = max(float(self._best_E.sum()), torch.finfo(torch.float64).tiny)
        return (mass_E.cumsum(0) / total).tolist()

    @property
    def load_imbalance(self) -> float:
        return float(self.load_E.max() / self.load_E.double().mean())


@torch.no_grad()
def show(model: nn.Module, probe: Iterable[Inputs], observers: Sequence[Observer]) -> None:
    """Run the probe through the model in dense, evaluation mode; every switchable FFN's observer sees its input."""
    # Observers are not worth compiling, and what a compiled block makes of them is beyond torch.compile.
    with in_mode(model, "dense"), torch.compiler.set_stance("force_eager"), ExitStack() as hooks:
        for observer, layer in zip(observers, layers_of(model), strict=True):
            hooks.enter_context(layer.register_forward_pre_hook(partial(_see, observer), with_kwargs=True))
        model.eval()
        for batch in probe:
            model(batch) if isinstance(batch, Tensor) else model(**batch)
    reshard(model)


def _see(
    observer: Observer, layer: SwitchableFFN, args: tuple[Tensor, ...], named: Mapping[str, Tensor]
) -> None:
    observer(layer, *args, *named.values())


def pack(active_TF: Tensor, neuron_ids_F: Tensor) -> Tensor:
    """Return the pattern of neurons in their present order as bits, uint8 [T, W], in their first order, on the CPU."""
    row_of_F = np.argsort(neuron_ids_F.cpu().numpy())
    first_TF = np.take(active_TF.cpu().numpy(), row_of_F, axis=1)
    return torch.from_numpy(np.packbits(first_TF, axis=1))


def unpack(packed_TW: Tensor, neurons: int) -> Tensor:
    """Return the pattern of `pack` as bool [T, neurons], in the neurons' first order."""
    return torch.from_numpy(np.unpackbits(packed_TW.numpy(), axis=1, count=neurons).view(np.bool_))


def jaccard(a_TW: Tensor, b_TW: Tensor) -> float:
    """Return the Jaccard index of two packed patterns of the same tokens, mean over the tokens.

    A token on which no neuron fires in either pattern counts as 1: nothing differs.
    """
    a, b = a_TW.numpy(), b_TW.numpy()
    both_T, either_T = (np.bitwise_count(bits).sum(axis=1, dtype=np.int64) for bits in (a & b, a | b))
    return float(np.where(either_T > 0, both_T / np.maximum(either_T, 1), 1.0).mean())


def routes_changed(a_TK: Tensor, b_TK: Tensor) -> float | None:
    """Return the share of tokens whose set of K experts is another one; None if K is another: then every set is."""
    k = a_TK.shape[1]
    if b_TK.shape[1] != k:
        return None
    kept_T = (a_TK[:, :, None] == b_TK[:, None, :]).sum(dim=(1, 2))
    return float((kept_T < k).double().mean())
