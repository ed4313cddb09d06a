"""SSD in transformers' own Trainer: convert the model, add one callback.

    convert(model, config)
    trainer = Trainer(model, args, train_dataset=..., callbacks=[SwitchableCallback(probe, config)])
    trainer.train()                                  # and trainer.train(resume_from_checkpoint=True)

The callback calls the same `Controller` as our own loop, after every optimizer step. Its state travels in the
Trainer's `trainer_state.json`, as plain numbers; routers and moments are in the checkpoints anyway. One process or DDP;
a model sharded by accelerate is refused.

The model is in the loop's mode from the beginning of a step to its last backward pass. In between it is dense, so that
evaluations and predictions compare across steps, and after training until `set_mode` says otherwise. Nothing is hooked
into the layers: where training was broken off in the middle of a step, `set_mode` counts too.
"""

from __future__ import annotations

import base64
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from switchable.errors import InputError
from switchable.ffn.convert import layers_of, set_mode
from switchable.settings import SwitchConfig
from switchable.store.contents import PER_LAYER
from switchable.switching.controller import Controller, Measurement
from switchable.switching.probe import ProbeInputs


class SwitchableCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Switches a converted model between dense and sparse steps while a `transformers.Trainer` trains it.

    Args:
        probe: fixed model inputs on which everything is measured: token ids [B, S], a batch, or several batches.
        config: the settings of the schedule; default: those given to `convert`.
        seed: seed of the clustering.
    """

    def __init__(
        self, probe: ProbeInputs | None = None, config: SwitchConfig | None = None, seed: int = 0
    ) -> None:
        self.probe, self.config, self.seed = probe, config, seed
        self._in_step = False
        self.controller: Controller | None = None
        """The controller, from the beginning of training on."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: nn.Module, **_others: Any
    ) -> None:
        """Make the controller; after a resume, put it where it was.

        Raises:
            InputError: no probe, the model is not converted or is sharded, or its checkpoint has no such callback.
        """
        if self.probe is None:
            raise InputError(
                "SwitchableCallback has no probe; give it model inputs, and leave the Trainer's "
                "restore_callback_states_from_checkpoint at False (this callback restores itself)"
            )
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise InputError(
                "the model is sharded by the Trainer; train it with DDP there, "
                "or with torchrun -m switchable pretrain --parallel fsdp"
            )
        probe = send_to_device(self.probe, next(model.parameters()).device)
        self.controller = Controller(model, probe, state.max_steps, self.config, self.seed)
        # For a loss that the Trainer computes itself: with label smoothing, or `compute_loss_func`.
        layers_of(model)[0].ssd.loss_scale.unseen = 1.0 / args.gradient_accumulation_steps
        if state.global_step > 0:
            self.controller.load_state_dict(_stored(state, type(self).__name__))
        self._leave_step(model)

    def on_step_begin(self, *_: Any, model: nn.Module, **_others: Any) -> None:
        """Put the model into the mode of this step."""
        assert self.controller is not None, "on_train_begin comes first"
        set_mode(model, self.controller.mode)
        self._in_step = True

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **_others: Any) -> None:
        """All of the step's passes are done: whatever is computed before the next step is dense."""
        self._leave_step(model)

    def _leave_step(self, model: nn.Module) -> None:
        self._in_step = False
        set_mode(model, "dense")

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, *_: Any, model: nn.Module, **others: Any
    ) -> None:
        """Count the step and measure if it is time."""
        assert self.controller is not None, "on_train_begin comes first"
        measurement = self.controller.step(others["optimizer"])
        self._leave_step(model)
        if measurement is not None:
            state.log_history.append(_line(measurement, state.epoch))

    def on_evaluate(self, *_: Any, model: nn.Module, **_others: Any) -> None:
        """Say so where an evaluation fell into a step: training was broken off there, or a callback evaluates in it."""
        if self._in_step:
            modes = {layer.ssd.mode for layer in layers_of(model)}
            logging.getLogger(__name__).warning(
                "evaluated in %s mode: training is in the middle of a step, or broke off in one; call set_mode first",
                "sparse" if "sparse" in modes else "dense",
            )

    on_predict = on_evaluate

    def on_train_end(self, *_: Any, model: nn.Module, **_others: Any) -> None:
        """Leave the model in dense mode."""
        self._leave_step(model)

    def state(self) -> dict[str, Any]:
        """Return what `trainer_state.json` keeps: the controller's state as plain numbers."""
        if self.controller is None:
            return {"args": {}, "attributes": {}}
        plain = self.controller.state_dict()
        plain |= {key: [_as_text(tensor) for tensor in plain[key]] for key in PER_LAYER}
        return {"args": {}, "attributes": {"controller_state": plain}}


def _stored(state: TrainerState, name: str) -> dict[str, Any]:
    found = (state.stateful_callbacks or {}).get(name, {})
    kept = found.get("attributes", {}).get("controller_state") if isinstance(found, dict) else None
    if kept is None or kept["steps_done"] != state.global_step:
        raise InputError(
            f"the checkpoint at step {state.global_step} was not trained with one {name}; "
            "resume from one that was, or start anew"
        )
    return {**kept, **{key: [_as_tensor(text) for text in kept[key]] for key in PER_LAYER}}


def _as_text(tensor: Tensor | None) -> dict[str, Any] | None:
    """A tensor of whole numbers as JSON can hold it: type, shape, and bytes in base 64."""
    if tensor is None:
        return None
    array = tensor.cpu().contiguous().numpy()
    text = base64.b64encode(array.tobytes()).decode()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "base64": text}


def _as_tensor(stored: Mapping[str, Any] | None) -> Tensor | None:
    if stored is None:
        return None
    flat = np.frombuffer(base64.b64decode(stored["base64"]), dtype=np.dtype(stored["dtype"]))
    return torch.from_numpy(flat.reshape(stored["shape"]).copy())


def _line(measurement: Measurement, epoch: float | None) -> dict[str, Any]:
    """Return an entry of the Trainer's log: each measure, layer by layer."""
    layers = [dataclasses.asdict(layer) for layer in measurement.layers]
    line: dict[str, Any] = {f"switchable_{key}": [layer[key] for layer in layers] for key in layers[0]}
    line["switchable_takes_part"] = list(measurement.takes_part)
    return {"epoch": epoch, "step": measurement.step, **line}
