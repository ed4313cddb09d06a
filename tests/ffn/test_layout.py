"""Each neuron's weights lie side by side after conversion, and nothing else about the model has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import HomeMade
from torch import Tensor, nn

from switchable import Family, SwitchConfig, convert, set_mode
from switchable.ffn.convert import is_router_parameter, layers_of
from switchable.ffn.layout import store_by_neuron, store_by_row
from switchable.store.checkpoint import write
from switchable.store.contents import contents_of, training_state
from switchable.store.restore import restore_training
from switchable.switching.switch import regroup

Make = Callable[..., nn.Module]
CONFIG = SwitchConfig(num_experts=8, experts_per_token=3)
HOME_MADE = Family(ffn="MyMLP", up="fc1", down="fc2")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["Conv1D", "Linear"])
def test_conversion_puts_each_neuron_in_one_place(make_gpt2: Make, kind: str) -> None:
    model = make_gpt2() if kind == "Conv1D" else HomeMade()
    family = None if kind == "Conv1D" else HOME_MADE
    shapes = {name: p.shape for name, p in model.named_parameters()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3), family)
    for layer in layers_of(model):
        assert layer.ssd.weights.up_FD.is_contiguous()
        assert layer.ssd.weights.down_FD.is_contiguous()
    for name, parameter in model.named_parameters():
        if not is_router_parameter(name):
            assert parameter.shape == shapes[name]
            assert id(parameter) == identities[name]  # an optimizer that holds it holds it still


def test_storage_can_stay_as_it_is_and_be_put_back(make_gpt2: Make) -> None:
    model = make_gpt2()
    before = {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    convert(model, CONFIG, neuron_major=False)
    after = {n: (p.data_ptr(), p.stride()) for n, p in model.named_parameters() if not is_router_parameter(n)}
    assert after == before
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    for layer in layers_of(model):
        store_by_neuron(layer)
        assert not layer.ssd.up_projection.weight.is_contiguous()
        store_by_row(layer)
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous()
        assert torch.equal(parameter, values[name])


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_gradients_and_moments_take_over_the_layout(make_gpt2: Make, tokens: Tensor, mode: str) -> None:
    model = make_gpt2()
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3, backend="fused"))
    set_mode(model, mode)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, tokens)
    for layer in layers_of(model):
        for weight in (layer.ssd.up_projection.weight, layer.ssd.down_projection.weight):
            assert weight.grad is not None
            assert weight.grad.stride() == weight.stride()
            assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()


def test_the_layout_survives_copies_casts_loading_and_regrouping(make_gpt2: Make) -> None:
    model = make_gpt2()
    convert(model, CONFIG)
    strides = layers_of(model)[0].ssd.up_projection.weight.stride()
    other = copy.deepcopy(model).double()
    other.load_state_dict({name: t.contiguous() for name, t in model.state_dict().items()})
    labels = torch.arange(64) % 8
    regroup(layers_of(other), [labels] * 2)
    assert layers_of(other)[0].ssd.up_projection.weight.stride() == strides
    assert layers_of(other)[0].ssd.weights.up_FD.is_contiguous()


def test_checkpoints_are_contiguous_and_restore_the_layout_of_the_moments(
    make_gpt2: Make, tokens: Tensor, tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = make_gpt2()
    convert(model, CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, tokens)
    nothing = {name: [None, None] for name in ("last", "patterns", "routes")}
    write(tmp_path / "saved", contents_of(model, training_state(model, optimizer, nothing, {})))
    assert all(
        tensor.is_contiguous() for tensor in load_file(tmp_path / "saved" / "model.safetensors").values()
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(plain(tokens).logits, model.eval()(tokens).logits)
    again = make_gpt2()
    convert(again, CONFIG)
    other = torch.optim.AdamW(again.parameters())
    restore_training(tmp_path / "saved", again, other)
    for theirs, mine in zip(again.parameters(), model.parameters(), strict=True):
        assert theirs.stride() == mine.stride()
        if mine in optimizer.state:
            assert other.state[theirs]["exp_avg"].stride() == mine.stride()
            assert torch.equal(other.state[theirs]["exp_avg"], optimizer.state[mine]["exp_avg"])


def test_converted_models_are_saved_as_the_readme_says(make_gpt2: Make, tmp_path: Path) -> None:
    by_neuron, by_row = make_gpt2(), make_gpt2()
    by_neuron.lm_head.weight = nn.Parameter(
        by_neuron.lm_head.weight.clone()
    )  # save_file takes no tied weights
    by_row.load_state_dict(by_neuron.state_dict())
    by_row.lm_head.weight = nn.Parameter(by_row.lm_head.weight.clone())
    convert(by_neuron, CONFIG)
    convert(by_row, CONFIG, neuron_major=False)
    with pytest.raises(ValueError, match="non contiguous"):
        save_file(by_neuron.state_dict(), tmp_path / "model.safetensors")
    save_file(by_row.state_dict(), tmp_path / "model.safetensors")
    by_neuron.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    stored = load_file(tmp_path / "saved/model.safetensors")
    name = "transformer.h.0.mlp.c_proj.weight"
    assert torch.equal(stored[name], by_neuron.state_dict()[name])
    assert torch.equal(load_file(tmp_path / "model.safetensors")[name], by_neuron.state_dict()[name])


def test_weights_of_several_names_stay_contiguous() -> None:
    model = HomeMade()
    model.blocks[2].fc2.weight = model.blocks[1].fc2.weight
    convert(model, CONFIG, HOME_MADE)
    outputs = [layer.ssd.down_projection.weight for layer in layers_of(model)]
    assert [weight.is_contiguous() for weight in outputs] == [False, True, True]
    assert outputs[1] is outputs[2]
