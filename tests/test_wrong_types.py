"""What the package's own names are given wrongly from Python: refused in words, nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import tiny_gpt2
from torch import Tensor, nn

from switchable import Controller, Family, InputError, SwitchConfig, convert, in_mode, load, set_mode
from switchable.ffn.convert import layers_of
from switchable.infer.sampling import Sampling
from switchable.store.probe import load_probe


@pytest.mark.parametrize(
    "k", [2.5, 0, -1, 9, True, "2", 10**4200, float("nan"), [3], [3, 2.5], "33", torch.tensor(3)]
)
def test_experts_per_token(switchable_gpt2: nn.Module, k: Any) -> None:
    with pytest.raises(InputError, match="experts_per_token"):
        set_mode(switchable_gpt2, "sparse", k)
    with pytest.raises(InputError, match="experts_per_token"), in_mode(switchable_gpt2, "sparse", k):
        pass
    with pytest.raises(InputError, match="experts_per_token"):
        layers_of(switchable_gpt2)[0].ssd.set_experts_per_token(k)
    assert {(layer.ssd.mode, layer.ssd.experts_per_token) for layer in layers_of(switchable_gpt2)} == {
        ("dense", 3)
    }


def test_numbers_of_numpy_are_numbers(switchable_gpt2: nn.Module) -> None:
    set_mode(switchable_gpt2, "sparse", np.int64(2), mass=np.float32(0.5))
    ssd = layers_of(switchable_gpt2)[0].ssd
    assert (type(ssd.experts_per_token), ssd.experts_per_token, type(ssd.mass), ssd.mass) == (
        int,
        2,
        float,
        0.5,
    )
    assert type(SwitchConfig(num_experts=np.int32(8), mass_target=np.float64(0.5)).num_experts) is int


@pytest.mark.parametrize("mode", ["Dense", None, 1, ["sparse"]])
def test_mode(switchable_gpt2: nn.Module, mode: Any) -> None:
    with pytest.raises(InputError, match="is not known; use 'dense' or 'sparse'"):
        set_mode(switchable_gpt2, mode)


def test_what_is_no_model() -> None:
    for call in (convert, lambda model: set_mode(model, "dense"), lambda model: Controller(model, None, 10)):
        with pytest.raises(InputError, match="model='gpt2' must be a Module"):
            call("gpt2")
    with pytest.raises(InputError, match="folder=3 must be a"):
        load(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"config": {"num_experts": 8}}, "config={'num_experts': 8} must be a SwitchConfig"),
        (
            {"config": SwitchConfig(num_experts=8, experts_per_token=2), "family": "gpt2"},
            "family='gpt2' must be a Family",
        ),
        ({"family": []}, r"family=\[\] describes no FFN"),
        ({"example_inputs": 3}, "example_inputs=3 must be a Sequence"),
    ],
)
def test_convert(given: dict[str, Any], said: str) -> None:
    model = tiny_gpt2()
    with pytest.raises(InputError, match=said):
        convert(model, **given)
    assert not layers_of(model)


@pytest.mark.parametrize("given", [{"ffn": 3}, {"ffn": (3,)}, {"up": None}, {"gate": 1}, {"in_layer": "yes"}])
def test_family(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"{next(iter(given))}=\S+ must be"):
        Family(**{"ffn": "MyMLP", "up": "fc1", "down": "fc2", **given})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"total_steps": 2.5}, "total_steps=2.5 must be a whole number"),
        ({"total_steps": 0}, "total_steps=0 is out of range; use a whole number of at least 1"),
        ({"total_steps": 10**400}, "total_steps=.* is out of range"),
        ({"seed": -1}, "seed=-1 is out of range; use a whole number from 0 to 4294967295"),
        ({"seed": 0.5}, "seed=0.5 must be a whole number"),
        ({"config": 3}, "config=3 must be a SwitchConfig"),
        ({"config": SwitchConfig(num_experts=4)}, "num_experts=4, and the model was converted with 8"),
        ({"probe": 3}, "probe=3 must be token ids"),
        ({"probe": []}, r"probe=\[\] must be token ids"),
        ({"probe": [[1, 2]]}, "must be token ids, a batch of model inputs, or several"),
        ({"copies": nn.Linear(1, 1)}, "copies=Linear.* must be a Sequence"),
    ],
)
def test_controller(switchable_gpt2: nn.Module, tokens: Tensor, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Controller(switchable_gpt2, **{"probe": tokens, "total_steps": 10, **given})


def test_a_controllers_state_of_a_model_with_other_layers(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    controller = Controller(switchable_gpt2, tokens, 10)
    with pytest.raises(InputError, match="this state is of 1 switchable FFNs; the model has 2"):
        controller.load_state_dict(controller.state_dict() | {"takes_part": [False]})
    with pytest.raises(
        InputError, match="no state of a Controller, or a damaged one: it has no 'takes_part'"
    ):
        controller.load_state_dict({})


@pytest.mark.parametrize("name", ["weight", "0.weight"])
def test_a_probe_of_other_tensors(tmp_path: Path, name: str) -> None:
    save_file({name: torch.zeros(2, 4)}, tmp_path / "probe.safetensors")
    with pytest.raises(InputError, match=r"probe\.safetensors is damaged"):
        load_probe(tmp_path / "probe.safetensors")


def test_a_controller_steps_after_an_optimizer(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    controller = Controller(switchable_gpt2, tokens, 10)
    with pytest.raises(InputError, match=r"no optimizer in \(None,\); give the one"):
        controller.step(None)
    assert controller.steps_done == 0


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1e-5])
def test_a_temperature_that_logits_cannot_be_divided_by_takes_the_most_probable_token(
    temperature: float,
) -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0], [90.0, 0.0, -90.0]])
    assert Sampling(temperature=temperature).draw(logits).tolist() == [1, 0]
