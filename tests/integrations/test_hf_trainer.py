"""The example of docs/scale.md as a test: SSD in transformers' Trainer with one callback, bitwise resume included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_gpt2
from torch import nn

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from switchable import Controller, InputError, SwitchConfig, convert, set_mode
from switchable.ffn.convert import layers_of
from switchable.integrations.hf_trainer import SwitchableCallback
from switchable.store import checkpoint

CONFIG = SwitchConfig(
    num_experts=8, experts_per_token=3, monitor_every=4, min_dense_fraction=0.2, stability_threshold=0.0,
    max_activation_ratio=1.0, min_mass_caught=0.0, sparse_steps=2, final_dense_fraction=0.2,
)  # fmt: skip
IDS = torch.randint(0, 61, (48, 24), generator=torch.Generator().manual_seed(5))
ROWS = [{"input_ids": ids, "labels": ids} for ids in IDS]


class Losses(SwitchableCallback):
    """Remembers what modes the steps were in."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.modes: list[str] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_step_begin(*args, **kwargs)
        self.modes.append(
            "sparse" if any(layer.ssd.mode == "sparse" for layer in layers_of(kwargs["model"])) else "dense"
        )


def trainer(out: Path, model: nn.Module | None = None, **changes: Any) -> Trainer:
    if model is None:
        model = tiny_gpt2()
        convert(model, CONFIG)
    settings: dict[str, Any] = {
        "max_steps": 20, "save_steps": 10, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant", "weight_decay": 0.1,
        "dataloader_pin_memory": False,
    } | changes  # fmt: skip
    arguments = TrainingArguments(output_dir=str(out), **settings)
    # The settings are those given to `convert`.
    return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[Losses(IDS[:8])])


def callback(of: Trainer) -> Losses:
    return next(c for c in of.callback_handler.callbacks if isinstance(c, Losses))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    out = tmp_path_factory.mktemp("trainer")
    trained = trainer(out)
    trained.train()
    return out, trained


def test_it_switches_as_the_controller_says(whole: tuple[Path, Trainer]) -> None:
    _, trained = whole
    controller = callback(trained).controller
    assert isinstance(controller, Controller)
    assert callback(trained).modes == [
        "sparse" if c == "s" else "dense" for c in "ddddssdssdssdssddddd"[:16] + "dddd"
    ]
    assert controller.switches >= 6
    measured = [line for line in trained.state.log_history if "switchable_activation_ratio" in line]
    # 14: 8 % of the steps before the last dense phase, the router chooses from there on.
    assert [line["step"] for line in measured] == [4, 8, 12, 14, 16, 20]
    assert len(measured[0]["switchable_mass_caught"]) == 2


def test_a_resumed_run_is_bitwise_the_same(whole: tuple[Path, Trainer], tmp_path: Path) -> None:
    out, undisturbed = whole
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(out / "checkpoint-10"))
    ours, theirs = undisturbed.model.state_dict(), again.model.state_dict()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert callback(again).modes == callback(undisturbed).modes[10:]
    assert callback(again).controller.switches == callback(undisturbed).controller.switches  # type: ignore[union-attr]


def test_micro_batches_weigh_the_router_as_one_batch(tmp_path: Path) -> None:
    """SGD, because AdamW would not notice a factor."""
    found = []
    for rows, parts in ((8, 1), (2, 4)):
        one = trainer(
            tmp_path / str(parts), per_device_train_batch_size=rows, gradient_accumulation_steps=parts, optim="sgd",
            max_steps=6,
        )  # fmt: skip
        one.train()
        found.append(one.model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


class ByHand(TrainerCallback):
    """Evaluates and predicts in the middle of training."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        self.trainer.evaluate()
        self.trainer.predict(ROWS[:4])  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["steps", "epoch", "by hand"])
def test_evaluations_are_dense_and_the_mode_comes_back(tmp_path: Path, how: str) -> None:
    model = tiny_gpt2()
    convert(model, CONFIG)
    seen = {True: set(), False: set()}  # type: dict[bool, set[str]]

    def watch(layer: Any, *_: Any) -> None:
        seen[layer.training].add(layer.ssd.mode)

    layers_of(model)[1].register_forward_hook(watch)
    strategy = {"eval_strategy": "no" if how == "by hand" else how, "eval_steps": 1, "save_strategy": "no"}
    trained = trainer(tmp_path, model, **strategy, per_device_eval_batch_size=4, max_steps=13)
    if how == "by hand":
        by_hand = ByHand()
        by_hand.trainer = trained
        trained.add_callback(by_hand)
    else:
        trained.args.max_steps = 26
    trained.train()
    assert seen == {True: {"dense", "sparse"}, False: {"dense"}}
    modes = callback(trained).modes
    assert "sparse" in modes[1:]
    undisturbed = trainer(
        tmp_path / "undisturbed", eval_strategy="no", save_strategy="no", max_steps=len(modes)
    )
    undisturbed.train()
    assert callback(undisturbed).modes == modes
    assert {layer.ssd.mode for layer in layers_of(model)} == {"dense"}
    set_mode(model, "sparse")
    trained.evaluate()  # after training it is what the user says
    assert seen[False] == {"dense", "sparse"}


class Broken(TrainerCallback):
    """Breaks training off in the middle of a sparse step: in its forward pass, or between two steps."""

    def __init__(self, model: nn.Module, error: type[BaseException], in_step: bool) -> None:
        self.model, self.error, self.in_step = model, error, in_step

    def _break(self, *_: Any) -> None:
        if layers_of(self.model)[1].ssd.mode == "sparse":
            raise self.error

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.hook = layers_of(self.model)[0].register_forward_pre_hook(self._break) if self.in_step else None

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        if not self.in_step and state.global_step == 5:
            raise self.error


@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_training_broke_off_the_mode_is_what_the_user_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: type[BaseException], in_step: bool
) -> None:
    model = tiny_gpt2()
    convert(model, CONFIG)
    trained = trainer(tmp_path, model, save_strategy="no")
    broken = Broken(model, error, in_step)
    trained.add_callback(broken)
    with pytest.raises(error):
        trained.train()
    if broken.hook is not None:
        broken.hook.remove()
    assert {layer.ssd.mode for layer in layers_of(model)} == ({"sparse"} if in_step else {"dense"})
    trained.evaluate()
    assert ("evaluated in sparse mode: training is in the middle of a step" in caplog.text) == in_step
    fresh = tiny_gpt2()
    convert(fresh, CONFIG)
    fresh.load_state_dict(model.state_dict())
    found = {}
    for mode in ("dense", "sparse", "dense"):
        set_mode(model, mode)
        set_mode(fresh, mode)
        with torch.no_grad():
            found[mode] = fresh.eval()(input_ids=IDS[:4]).logits
        assert torch.equal(torch.tensor(trained.predict(ROWS[:4]).predictions), found[mode])  # type: ignore[arg-type]
    assert not torch.equal(found["dense"], found["sparse"])


def test_what_was_trained_exports_to_a_plain_model(whole: tuple[Path, Trainer], tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "final", whole[1].model)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    with torch.no_grad():
        expected = whole[1].model.eval()(input_ids=IDS[:2]).logits
        torch.testing.assert_close(plain(input_ids=IDS[:2]).logits, expected)


def test_wrong_use_is_refused(whole: tuple[Path, Trainer], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no switchable FFNs; call convert"):
        trainer(tmp_path, tiny_gpt2()).train()
    stored = whole[0] / "checkpoint-10/trainer_state.json"
    state = json.loads(stored.read_text())
    assert state["stateful_callbacks"].pop("Losses")
    with pytest.MonkeyPatch.context() as patch:
        original: Callable[..., Any] = type(whole[1].state).load_from_json

        def without(path: str) -> Any:
            loaded = original(path)
            loaded.stateful_callbacks.pop("Losses")
            return loaded

        patch.setattr(type(whole[1].state), "load_from_json", staticmethod(without))
        with pytest.raises(InputError, match=r"step 10 was not trained with one Losses"):
            trainer(tmp_path).train(resume_from_checkpoint=str(whole[0] / "checkpoint-10"))
