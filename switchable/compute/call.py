"""One call of expert compute: what every way of computing it is given.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from switchable.compute.weights import FFNWeights as FFNWeights


class ExpertCall(NamedTuple):
    """y_t = Σ_k gate_tk · FFN_e(t,k)(x_t), to be computed."""

    x_TD: Tensor
    """The FFN's input, one row per token, any strides."""
    weights: FFNWeights
    """The FFN's, neurons in cluster order."""
    expert_ids_TK: Tensor
    """The selected experts, distinct within a row, int64 in [0, num_experts)."""
    num_experts: int
    """E; divides F."""
    activation: str
    """A name in transformers' `ACT2FN`."""
    gates_TK: Tensor | None = None
    unit_gates: bool = False
    """A promise that every gate *is* 1 (straight-through gates): the multiplication may be left out; the gates'
    gradient is still computed."""

    @property
    def neurons(self) -> int:
        """I."""
        return len(self.weights.up_FD) // self.num_experts

    @property
    def gates_that_count(self) -> Tensor | None:
        """The gates, or None where they are 1 and nobody asks for their gradient."""
        gates_TK = self.gates_TK
        learns = gates_TK is not None and gates_TK.requires_grad and torch.is_grad_enabled()
        return None if self.unit_gates and not learns else gates_TK

    @property
    def learns(self) -> bool:
        """Whether anything asks for a gradient."""
        weights = self.weights
        tensors = (
            self.x_TD,
            weights.up_FD,
            weights.down_FD,
            weights.up_bias_F,
            weights.gate_FD,
            self.gates_TK,
        )
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
