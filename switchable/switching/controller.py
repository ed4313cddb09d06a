"""The object that a training loop calls once per step: measure -> decide -> regroup -> set the mode.

    report = convert(model, config)
    controller = Controller(model, probe, total_steps=10_000, config=config)
    for batch in batches:                      # any loop
        model(**batch).loss.backward()
        optimizer.step(); optimizer.zero_grad()
        controller.step(optimizer)             # or of several: step(muon, adamw); decides the mode of the next step

Its state (`state_dict`) is all that a resumed run needs besides weights and optimizer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from switchable.errors import InputError
from switchable.ffn.active_training import input_like, skips
from switchable.ffn.convert import layers_of, set_mode, why_dense
from switchable.ffn.plain import check_movable, check_readable
from switchable.options import checked
from switchable.ranks import is_main, reshard
from switchable.settings import BY_RECIPE, SwitchConfig, settled
from switchable.switching.copies import copied_tensors, describe_anew, not_given, twins
from switchable.switching.costs import costs_of_layers, from_plain, in_bfloat16, plain
from switchable.switching.measures import Precision
from switchable.switching.monitor import Found, LayerMeasures, measure
from switchable.switching.optimizers import check_state, check_trained, optimizers_in
from switchable.switching.probe import ProbeInputs, as_batches, tokens_of
from switchable.switching.schedule import Schedule
from switchable.switching.state import Change, ScheduleState
from switchable.switching.switch import regroup

MOST_SEED = 2**32 - 1
"""What NumPy takes."""
OTHERS = "neurons move, but not in other copies of this model (%d); give averages: copies=[average]"


@dataclass(frozen=True)
class Measurement:
    """What one measurement found and what was done about it."""

    step: int
    """Optimizer steps done."""
    layers: tuple[LayerMeasures, ...]
    regrouped: tuple[bool, ...]
    """Whether each layer was given the structure just found, and its neurons moved for it."""
    takes_part: tuple[bool, ...]
    """Whether each layer is sparse in sparse steps from now on."""
    experts_per_token: tuple[int, ...]
    """K of each layer in sparse mode from now on."""
    permutations: tuple[Tensor | None, ...]
    """How each layer's neurons moved, for whatever else is kept of them: row i was row perm_F[i]. None: they stayed."""
    changes: tuple[Change, ...]
    """Which layers multiply in another way from now on, and why."""


class Controller:
    """Switches a converted model between dense and sparse training.

    Gradients may be accumulated and the loss scaled: routers follow what the loop makes of the loss that the model
    returns. Of a loss computed outside the model they do not know: `layers[0].ssd.loss_scale.unseen` is its factor.
    Clip gradients by the norm of all: routers' are a 32nd of their loss's (`loss_scale.routers`) and hardly count. Adam
    and its kind divide that out again; with SGD give routers 32 times the learning rate.

    Args:
        model: a converted model.
        probe: fixed model inputs on which everything is measured: a batch (a tensor, the model's first input, or a
            mapping, its inputs by name) or several. It is tried at once.
        total_steps: optimizer steps of the whole run.
        config: the settings of the schedule; default: those given to `convert`.
        seed: seed of the clustering.
        schedule: when to switch; a baseline's is another one.
        copies: what else holds the model's weights and must stay the same model when neurons move, such as
            averages (EMA): modules, state dicts, or lists of tensors in the order of `model.parameters()`.
        precision: the context in which the probe is multiplied, e.g. `lambda: torch.autocast("cuda", torch.bfloat16)`
            in a loop that trains so.

    Raises:
        InputError: a wrong type, a model that is not converted, or into other experts than `config` asks for,
            total_steps not positive, a copy of another model, adapters on an FFN that is to be regrouped or measured,
            or a probe that the model fails with or that misses an FFN.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: ProbeInputs,
        total_steps: int,
        config: SwitchConfig | None = None,
        seed: int = 0,
        schedule: type[Schedule] = Schedule,
        copies: Sequence[object] = (),
        precision: Precision = nullcontext,
    ) -> None:
        self.layers = layers_of(checked("model", model, nn.Module))
        if not self.layers:
            raise InputError("the model has no switchable FFNs; call convert(model, config) first")
        self.model, self.seed = model, checked("seed", seed, int, least=0, most=MOST_SEED)
        self._checked = self._told = False
        self.precision = precision
        first = self.layers[0].ssd.settings
        given: SwitchConfig | None = checked("config", config, SwitchConfig | None)
        if given is not None and given.num_experts not in (BY_RECIPE, first.config.num_experts):
            raise InputError(
                f"config has num_experts={given.num_experts}, and the model was converted with "
                f"{first.config.num_experts}; give convert and Controller the same"
            )
        self.schedule = schedule(
            first.config if given is None else settled(given, first.d_ff, first.activation),
            checked("total_steps", total_steps, int, least=1),
        )
        check = check_readable if self.schedule.config.never_sparse else check_movable
        for layer in self.layers:
            check(layer.ssd)
        self.copies = tuple(checked("copies", copies, Sequence))
        self.twins = twins(self.layers, self.copies)
        copied_tensors(model, self.copies)  # found out now, not at the first regrouping
        self.probe = as_batches(probe)
        self.probe_tokens = tokens_of(model, self.probe, precision)
        """Tokens on which everything is measured."""
        self.tokens = self.probe_tokens // len(self.probe)
        """Tokens of a forward pass: as in the probe, unless the loop that trains says otherwise."""
        self.steps_done = 0
        self.schedule.skips = self._skips
        if in_bfloat16(self.layers[0], precision):
            self.schedule.penalised_from = self.schedule.young_until
        self.state: ScheduleState = self.schedule.initial(len(self.layers))
        self.last: list[Found | None] = [None] * len(self.layers)
        self.switches = 0
        self.regroupings = 0
        self._apply_mode()

    def time_layers(self) -> None:
        """Time each layer's ways to multiply, if the recipe weighs them and they are not known: `step` does it too."""
        if self.schedule.weighs and not self.schedule.costs:
            self.schedule.costs = costs_of_layers(self.layers, self.tokens, self.precision)

    def _skips(self, layer: int, share: float) -> bool:
        ssd = self.layers[layer].ssd
        with self.precision():
            return skips(ssd, input_like(ssd, self.tokens), share)

    @property
    def mode(self) -> str:
        """The mode of the next step."""
        return self.schedule.mode_at(self.steps_done, self.state)

    @property
    def phase(self) -> str:
        """The phase of the next step: `"dense"`, `"alternating"` or `"final dense"`."""
        return self.schedule.phase_at(self.steps_done, self.state)

    @property
    def measures_next(self) -> bool:
        """Whether the next call of `step` takes a measurement."""
        return self.schedule.is_measured(self.steps_done + 1, self.state)

    def step(self, *optimizers: Any) -> Measurement | None:
        """Count one optimizer step, measure if it is time, and set the mode of the next step.

        `optimizers` are all that have just stepped, wrapped or not; their state moves with the neurons. Returns the
        measurement, if one was taken.

        Raises:
            InputError: what is to be trained is in none of them, or one holds state that cannot move with the
                neurons. Both are found at the first call; nothing has moved then.
        """
        due = self.measures_next
        if due or not self._checked:
            reshard(self.model)  # a loop may have evaluated it
            found = optimizers_in(optimizers)
        if not self._checked:
            check_trained(self.layers, found)
            check_state(self.layers, found)
            if is_main():
                self._tell_of_the_loop()
            self.time_layers()
            self._checked = True
        before = self.mode
        self.steps_done += 1
        measurement = self._measure(found) if due else None
        self.switches += before != self.mode
        self._apply_mode()
        if due:
            describe_anew(self.model, self.copies)
        over = self.steps_done == self.schedule.total_steps and not self.schedule.config.never_sparse
        if over and is_main() and not any(self.state.takes_part):
            logging.getLogger(__name__).warning("there is no sparse mode: %s", self.why_dense())
        return measurement

    def _tell_of_the_loop(self) -> None:
        """Tell what the first step shows and nothing else would."""
        scale, say = self.layers[0].ssd.loss_scale, logging.getLogger(__name__).warning
        if scale.passes[False] and not scale.passes[True]:
            say("the model is in evaluation mode, in which routers learn nothing: call model.train()")
        if scale.outside > 1 and scale.unseen == 1 and self.schedule.config.activation_l1:
            told = (
                "the loss of %d forward passes is computed outside the model: if it is their mean, set "
                "layers_of(model)[0].ssd.loss_scale.unseen = 1 / %d, or the penalty on activations counts in each"
            )
            say(told, scale.outside, scale.outside)

    def why_dense(self) -> str | None:
        """Say which layers stay dense in sparse steps and what keeps them out; None if there are none."""
        return why_dense(self.model)

    def _measure(self, optimizers: Sequence[Any]) -> Measurement:
        fresh = self.schedule.groups_afresh(self.steps_done, self.state)
        seed, precision = self.seed + self.steps_done, self.precision
        measures, found = measure(self.model, self.probe, self.last, seed, fresh=fresh, precision=precision)
        decision = self.schedule.decide(self.steps_done, self.state, measures)
        wanted = [f.labels_F if again else None for f, again in zip(found, decision.regroup, strict=True)]
        perms = self._regroup(wanted, optimizers)
        pairs = zip(found, perms, strict=True)
        self.last = [f if perm is None else replace(f, labels_F=f.labels_F[perm]) for f, perm in pairs]
        moved = tuple(perm is not None for perm in perms)
        self.regroupings += sum(moved)
        self.state = now = decision.state
        sparse = now.takes_part, now.experts_per_token
        return Measurement(self.steps_done, tuple(measures), moved, *sparse, tuple(perms), decision.changes)

    def _regroup(self, wanted: Sequence[Tensor | None], optimizers: Sequence[Any]) -> list[Tensor | None]:
        """Give layers new structures; return how the neurons of each moved."""
        copies = copied_tensors(self.model, self.copies)
        if not self._told and any(label is not None for label in wanted):
            self._told = (others := not_given(self.layers, self.twins)) > 0
            if self._told and is_main():
                logging.getLogger(__name__).warning(OTHERS, others)
        return regroup(self.layers, wanted, optimizers, copies, self.twins)

    @property
    def experts_now(self) -> tuple[int | None, ...]:
        """Experts per token of each layer in the next step; None where the layer is dense."""
        return tuple(
            k if part and self.mode == "sparse" else None
            for k, part in zip(self.state.experts_per_token, self.state.takes_part, strict=True)
        )

    def _apply_mode(self) -> None:
        state = self.state
        for i, (layer, others) in enumerate(zip(self.layers, self.twins, strict=True)):
            layer.ssd.multiplies_active = state.multiplies_active[i]
            layer.ssd.activation_ratio = state.activation_ratio[i]
            layer.ssd.activation_l1 = state.activation_l1[i]
            # A twin's sparse mode is the model's; in which mode it is, is its owner's choice.
            for each in (layer, *others):
                each.ssd.takes_part, each.ssd.why_dense = state.takes_part[i], state.why_dense[i]
                each.ssd.estimates = state.estimates
                each.ssd.set_experts_per_token(state.experts_per_token[i])
        set_mode(self.model, self.mode)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs: plain values, and tensors per layer of the last measurement."""
        return {
            "schedule": self.schedule.name,
            "steps_done": self.steps_done,
            "switches": self.switches,
            "regroupings": self.regroupings,
            **self.state.plain(),
            "costs": plain(self.schedule.costs),
            "last": [None if found is None else found.labels_F for found in self.last],
            "patterns": [None if found is None else found.pattern_TW for found in self.last],
            "routes": [None if found is None else found.route_TK for found in self.last],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            InputError: it is no such state, was taken with another schedule, or of a model with more or fewer FFNs.
        """
        needed = ("takes_part", "steps_done", "switches", "regroupings", "last", "patterns", "routes")
        if lacking := [name for name in needed if name not in state]:
            raise InputError(f"this is no state of a Controller, or a damaged one: it has no {lacking[0]!r}")
        name = state.get("schedule", "ssd")  # which version 0.1 did not write
        if name != self.schedule.name:
            raise InputError(
                f"this run has schedule {name!r}, not {self.schedule.name!r}: it is a baseline of a comparison; go on "
                "with it by the command that started it (switchable compare)"
            )
        if (found := len(state["takes_part"])) != len(self.layers):
            raise InputError(f"this state is of {found} switchable FFNs; the model has {len(self.layers)}")
        self.steps_done, self.switches = state["steps_done"], state["switches"]
        self.regroupings = state["regroupings"]
        self.schedule.costs = from_plain(state.get("costs", ()))
        self.state = ScheduleState.from_plain(state)
        parts = zip(state["last"], state["patterns"], state["routes"], strict=True)
        self.last = [None if any(p is None for p in part) else Found(*part) for part in parts]
        self._apply_mode()
