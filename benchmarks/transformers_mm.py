"""`grouped_mm` and `batched_mm`: transformers' own expert forwards, run on our weights and routing.

They are contenders in the benchmarks and a second opinion in the tests. transformers writes them as methods of its
experts classes (`transformers/integrations/moe.py`); all that they ask of `self` is a handful of attributes, so we
hand them a namespace of views. What is copied, by whom:

- `grouped_mm` copies every token K times; no weights. torch's operator under it takes our strided views as they
  are, but only half and single precision, and strides that are multiples of 16 bytes; else an `InputError`.
- `batched_mm` copies the weights of the selected experts once per (token, expert): for a few tokens only.
- Gated FFNs: transformers wants gate and up projection in one tensor, so both are copied in every call.

The output projection of our experts has no bias (it is added outside), theirs has one whenever the input projection
does; `_NoBias` stands in for it.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from switchable.compute.call import ExpertCall
from switchable.errors import InputError


class _NoBias:
    """Answers every selection of experts with None, which their `_linear` functions take as "no bias"."""

    def __getitem__(self, expert_ids: Tensor) -> None:
        return None


def grouped_mm(call: ExpertCall) -> Tensor:
    """Return y_TD by `grouped_mm_experts_forward`.

    Raises:
        InputError: float64, or rows that are not a multiple of 16 bytes long.
    """
    _check_grouped(call)
    y_TD: Tensor = grouped_mm_experts_forward(_as_experts(call), call.x_TD, call.expert_ids_TK, _ones(call))
    return y_TD


def batched_mm(call: ExpertCall) -> Tensor:
    """Return y_TD by `batched_mm_experts_forward`."""
    y_TD: Tensor = batched_mm_experts_forward(_as_experts(call), call.x_TD, call.expert_ids_TK, _ones(call))
    return y_TD


def _check_grouped(call: ExpertCall) -> None:
    up_FD, neurons = call.weights.up_FD, call.neurons
    unit = 16 // up_FD.element_size()
    if up_FD.dtype == torch.float64 or neurons % unit or up_FD.shape[1] % unit:
        raise InputError(
            f"grouped_mm cannot multiply d_model={up_FD.shape[1]}, {neurons} neurons per expert in {up_FD.dtype}: "
            f"it takes half and single precision, and multiples of 16 bytes (here {unit} numbers); use another"
        )


def _ones(call: ExpertCall) -> Tensor:
    """Theirs scale every expert's output."""
    return call.x_TD.new_ones(call.expert_ids_TK.shape)


def _by_expert(values_FX: Tensor, num_experts: int) -> Tensor:
    return values_FX.view(num_experts, -1, *values_FX.shape[1:])


def _as_experts(call: ExpertCall) -> SimpleNamespace:
    """The attributes that transformers' forwards read; `up_proj` is [E, I, D], `down_proj` [E, D, I]."""
    weights, num_experts, act = call.weights, call.num_experts, ACT2FN[call.activation]
    experts = SimpleNamespace(
        num_experts=num_experts,
        act_fn=act,
        has_gate=weights.gate_FD is not None,
        has_bias=weights.up_bias_F is not None,
        has_post_expert_norm=False,
        is_transposed=False,
        _is_expert_parallel=False,
        down_proj=_by_expert(weights.down_FD, num_experts).mT,
        down_proj_bias=_NoBias(),
    )
    up_EID = _by_expert(weights.up_FD, num_experts)
    if weights.gate_FD is None:
        experts.up_proj = up_EID
        if weights.up_bias_F is not None:
            experts.up_proj_bias = _by_expert(weights.up_bias_F, num_experts)
        return experts
    experts.gate_up_proj = torch.cat([_by_expert(weights.gate_FD, num_experts), up_EID], 1)
    if weights.up_bias_F is not None:
        gate_bias_F = (
            weights.gate_bias_F if weights.gate_bias_F is not None else torch.zeros_like(weights.up_bias_F)
        )
        both = [_by_expert(bias_F, num_experts) for bias_F in (gate_bias_F, weights.up_bias_F)]
        experts.gate_up_proj_bias = torch.cat(both, 1)

    def apply_gate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated: Tensor = act(gate) * up
        return activated

    experts._apply_gate = apply_gate
    return experts
