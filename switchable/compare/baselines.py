"""What baselines exchange of SSD: the schedule, the layer, or both. Nothing outside a comparison needs them.

    static       sparse ever after, once layers have joined
    moe          a mixture of experts from the first step: outputs scaled by K x softmax over the chosen scores
    ssd-paper    all layers join together, long phases, regrouped at each change to sparse; a router row
                 is the mean of its expert's neurons

An expert's output is never scaled in SSD, so the fast paths cannot do that. A scaled layer computes each pair (token,
expert) as a token with one expert, and scales and adds up the outputs itself:

    y_t = Σ_k g_tk · FFN_e(t,k)(x_t)

Sources: Zhang et al. 2024 (arXiv 2410.03440); Fedus et al. 2022 (load-balance loss).
Shapes: T tokens, D d_model, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from switchable.compute.call import Rounded
from switchable.compute.cpu.topk import top_experts
from switchable.ffn.attached import attach_loss
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.ssd import FFNSettings
from switchable.ranks import gathered
from switchable.settings import SwitchConfig
from switchable.switching.controller import Controller
from switchable.switching.limits import missed, moves
from switchable.switching.monitor import LayerMeasures
from switchable.switching.schedule import Schedule
from switchable.switching.state import ScheduleState
from switchable.train.setup import Variant

LOAD_BALANCE = 0.01  # coefficient of the load-balance loss, Fedus et al.'s


class StaticSchedule(Schedule):
    """Sparse ever after, once some layer has joined; the structure stands."""

    name = "static"
    estimates = False

    @property
    def dense_from(self) -> int:
        """There is no last dense phase."""
        return self.total_steps

    def mode_at(self, step: int, state: ScheduleState) -> str:
        began = state.began is not None and step >= state.began and any(state.takes_part)
        return "sparse" if began and step < self.total_steps else "dense"

    def phase_at(self, step: int, state: ScheduleState) -> str:  # noqa: ARG002
        return "dense" if state.began is None or not any(state.takes_part) else "sparse"

    def _stays(self, step: int, layer: int, measured: LayerMeasures) -> bool:  # noqa: ARG002
        return True


class SparseSchedule(StaticSchedule):
    """Every layer sparse from the first step; nothing is measured."""

    name = "sparse"

    def initial(self, num_layers: int) -> ScheduleState:
        """Return the state at step 0: every layer sparse."""
        dense = super().initial(num_layers)
        return replace(dense, takes_part=(True,) * num_layers, began=0, why_dense=("",) * num_layers)

    def is_measured(self, steps_done: int, state: ScheduleState) -> bool:  # noqa: ARG002
        return False


class PaperSchedule(Schedule):
    """Layers join together by their means and none leaves; a new structure at each change to sparse.

    A dense phase takes 2.5 % of the run (our assumption, see `methods.py`).
    """

    name = "paper"
    estimates = False
    DENSE_PHASE = 0.025

    def __init__(self, config: SwitchConfig, total_steps: int) -> None:
        super().__init__(config, total_steps)
        self.dense_steps = max(1, round(self.DENSE_PHASE * total_steps))

    def is_measured(self, steps_done: int, state: ScheduleState) -> bool:
        """Return whether a measurement is due: at each change to sparse too."""
        return super().is_measured(steps_done, state) or self._enters_sparse(steps_done, state)

    def groups_afresh(self, steps_done: int, state: ScheduleState) -> bool:  # noqa: ARG002
        """Return True: structures are taken as they are found."""
        return True

    def _enters_sparse(self, step: int, state: ScheduleState) -> bool:
        return [self.mode_at(s, state) for s in (step - 1, step)] == ["dense", "sparse"]

    def _who_takes_part(
        self, step: int, state: ScheduleState, measures: Sequence[LayerMeasures]
    ) -> tuple[bool, ...]:
        if any(state.takes_part):
            return state.takes_part
        waits = step < self.dense_until or missed(self.config, measures) or moves(self.config, measures)
        return (not waits,) * len(measures)

    def _who_is_regrouped(
        self, step: int, state: ScheduleState, takes_part: Sequence[bool], measures: Sequence[LayerMeasures]
    ) -> tuple[bool, ...]:
        del takes_part, measures
        at_switch = self._enters_sparse(step, state)
        return tuple(at_switch or not part for part in state.takes_part)


class PaperController(Controller):
    """Routers are the means of their experts' neurons, anew after each regrouping."""

    def _regroup(self, wanted: Sequence[Tensor | None], optimizers: Sequence[Any]) -> list[Tensor | None]:
        perms = super()._regroup(wanted, optimizers)
        for layer, labels_F in zip(self.layers, wanted, strict=True):
            if labels_F is not None:
                with gathered(*layer.ssd.holders):
                    reads_FD = layer.ssd.reads_FD.detach().clone()
                layer.router.initialise(reads_FD)
        return perms


class _ScaledFFN(SwitchableFFN):
    """A layer whose experts' outputs are scaled; its router does not learn the activation mass."""

    def __init__(self, ffn: nn.Module, settings: FFNSettings) -> None:
        super().__init__(ffn, settings)
        self.ssd.router_learns = False

    def _scaled(self, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return y_t = Σ_k g_tk · FFN_e(t,k)(x_t)."""
        chosen = ids_TK.shape[1]
        y_TKD = self._experts(x_TD.repeat_interleave(chosen, dim=0), ids_TK.reshape(-1, 1))
        return (gates_TK.to(y_TKD.dtype).unsqueeze(-1) * y_TKD.view(*ids_TK.shape, -1)).sum(dim=1)


class MixtureFFN(_ScaledFFN):
    """A mixture of experts: gates are K x softmax over the chosen scores, so that they are 1 on average."""

    has_dense_mode: ClassVar[bool] = False
    router_passes: ClassVar[float] = 3.0

    def _mixed(self, x_TD: Tensor, _rounded: Rounded | None = None, /) -> Tensor:
        scores_TE = self.router(x_TD)  # the output depends on x through the gates too
        chosen = self.ssd.experts_per_token
        ids_TK = top_experts(scores_TE, chosen)
        y_TD = self._scaled(x_TD, ids_TK, chosen * scores_TE.gather(-1, ids_TK).softmax(dim=-1))
        if not self._trains:
            return y_TD
        loss = LOAD_BALANCE * load_balance_loss(scores_TE, ids_TK)
        return attach_loss(y_TD, loss, self.ssd.loss_scale.now)


class PaperFFN(_ScaledFFN):
    """Gates are exactly 1, and in sparse steps the router learns through them (straight-through)."""

    router_passes: ClassVar[float] = 2.0

    def _mixed(self, x_TD: Tensor, rounded: Rounded | None = None, /) -> Tensor:
        if not self._trains:
            return super()._mixed(x_TD, rounded)
        scores_TE = self.router(x_TD.detach())
        ids_TK = top_experts(scores_TE, self.ssd.experts_per_token)
        p_TK = scores_TE.gather(-1, ids_TK).softmax(dim=-1)
        return self._scaled(x_TD, ids_TK, 1.0 + (p_TK - p_TK.detach()))


def load_balance_loss(scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Return E Σ_e f_e P_e: 1 if all experts are used alike, E if one does everything (Fedus et al. 2022).

    f_e is expert e's share of the choices, P_e the mean over the tokens of its softmax probability, through which
    the gradient flows.
    """
    experts = scores_TE.shape[-1]
    share_E = torch.bincount(ids_TK.reshape(-1), minlength=experts) / ids_TK.numel()
    return experts * (share_E * scores_TE.softmax(dim=-1).mean(dim=0)).sum()


VARIANTS = {
    "static": Variant(schedule=StaticSchedule),
    "moe": Variant(layer=MixtureFFN, schedule=SparseSchedule),
    "ssd-paper": Variant(layer=PaperFFN, schedule=PaperSchedule, controller=PaperController),
}
"""By method; the others are SSD with other settings."""
