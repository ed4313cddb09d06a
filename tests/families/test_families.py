"""A tiny model of every family: the same function after conversion, and regrouping that changes nothing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from families.models import CASES, inputs, make, output
from support import relative_error
from torch import Tensor, nn

from switchable import Family, SwitchConfig, convert, set_mode
from switchable.ffn.convert import is_router_parameter, layers_of
from switchable.infer.loss import positions_of
from switchable.switching.monitor import measure
from switchable.switching.switch import regroup

CONFIG = SwitchConfig(num_experts=8, experts_per_token=3, backend="reference")
T5S = ("t5", "t5-gated", "mt5", "umt5")


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    output(model, batch).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_conversion_is_a_no_op_in_dense_mode(case: str) -> None:
    model, batch = make(case), inputs(case)
    plain = copy.deepcopy(model)
    before, names = output(model, batch), list(model.state_dict())
    report = convert(model, CONFIG)
    assert report.converted == CASES[case][3]
    assert report.ffns == f"{CASES[case][3]} of {CASES[case][3]} FFNs are switchable: 8 experts of 8 neurons"
    assert (
        relative_error(output(model, batch), before) < 1e-5
    )  # memory is laid out anew: the last bits may differ
    kept = {n: t for n, t in model.state_dict().items() if not is_router_parameter(n)}
    assert list(kept) == names
    assert len(model.state_dict()) == len(names) + 3 * report.converted  # weight, bias and description
    before_grads = gradients(plain, batch)
    after_grads = gradients(model, batch)
    for name, grad in before_grads.items():
        assert relative_error(after_grads[name], grad) < 1e-5 or grad.abs().max() < 1e-7, name


@pytest.mark.parametrize("case", CASES)
def test_all_experts_on_is_dense_and_one_expert_is_not(case: str) -> None:
    model, batch = make(case), inputs(case)
    convert(model, CONFIG)
    dense, dense_grads = output(model, batch), gradients(model, batch)
    set_mode(model, "sparse", experts_per_token=8)
    assert relative_error(output(model, batch), dense) < 1e-5
    for name, grad in gradients(model, batch).items():
        if name in dense_grads:
            assert (
                relative_error(grad, dense_grads[name]) < 1e-4
                or (grad - dense_grads[name]).abs().max() < 1e-7
            ), name
    set_mode(model, "sparse", experts_per_token=1)
    assert relative_error(output(model, batch), dense) > 1e-4
    set_mode(model, "dense")
    assert torch.equal(output(model, batch), dense)


@pytest.mark.parametrize("case", ["gpt2", "opt", "llama", "bert", "t5", "t5-gated", "bart"])
def test_regrouping_moves_weights_and_moments_and_changes_no_logits(case: str) -> None:
    model, batch = make(case), inputs(case)
    convert(model, CONFIG)
    before = output(model, batch).detach()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        output(m, batch).square().mean().backward()
        optimizer.step()
    measures, found = measure(model, [batch], [None] * CASES[case][3], random_state=0)
    assert all(0 < m.mass_caught <= m.mass_best <= 1 for m in measures)
    moved = regroup(layers_of(model), [each.labels_F for each in found], optimizers[:1])
    assert any(perm is not None for perm in moved)
    assert relative_error(output(model, batch), output(twin, batch)) < 1e-5
    assert relative_error(output(model, batch), before) > 1e-3  # the step did something
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        optimizer.zero_grad()
        output(m, batch).square().mean().backward()
        optimizer.step()
    assert relative_error(output(model, batch), output(twin, batch)) < 1e-4


@pytest.mark.parametrize("case", ["t5", "t5-gated", "bart"])
def test_dropout_between_the_projections(case: str) -> None:
    model, batch = make(case), inputs(case)
    for module in model.modules():
        for name in ("dropout", "attention_dropout"):  # all others off
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "activation_dropout"):
            module.activation_dropout = 0.25
    for module in model.modules():
        if type(module).__name__.startswith("T5Dense"):
            module.dropout.p = 0.25
    plain = copy.deepcopy(model)
    convert(model, CONFIG)
    model.train()
    plain.train()
    torch.manual_seed(5)
    expected = output(plain, batch)
    torch.manual_seed(5)
    assert torch.equal(output(model, batch), expected)
    # Sparse: it drops out a quarter of the neurons, and scales the others up by 4/3.
    layer = layers_of(model)[0]
    with torch.no_grad():
        layer.ssd.down_projection.weight.fill_(1.0)
        layer.ssd.up_projection.weight.abs_()
        if layer.ssd.gate_projection is not None:
            layer.ssd.gate_projection.weight.abs_()
    x = torch.ones(4000, 16)
    set_mode(model, "sparse", experts_per_token=8)
    trained = layer(x)[:, 0]
    model.eval()
    exact = layer(x)[0, 0]
    assert relative_error(trained.mean(), exact) < 0.02
    assert trained.std() > 0.01 * exact


def test_a_gated_ffn_inside_a_layer() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(6, 24), nn.Linear(24, 6), nn.Linear(6, 24)
            self.act, self.norm = nn.ReLU(), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.w2(self.act(self.w1(x)) * self.w3(x)))

    torch.manual_seed(0)
    model, x = nn.Sequential(Layer(), Layer()), torch.randn(3, 5, 6)
    before = model(x)
    family = Family("Layer", gate="w1", up="w3", down="w2", in_layer=True)
    convert(model, SwitchConfig(num_experts=4, experts_per_token=2), family)
    torch.testing.assert_close(model(x), before)
    set_mode(model, "sparse", experts_per_token=4)
    assert relative_error(model(x), before) < 1e-5


def test_output_projection_in_float32() -> None:
    model, batch = make("t5").bfloat16(), inputs("t5")
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.wo.float()
    before = output(model, batch)
    convert(model, CONFIG)
    assert torch.equal(output(model, batch), before)
    set_mode(model, "sparse", experts_per_token=8)
    assert relative_error(output(model, batch).float(), before.float()) < 0.05


def test_conversion_survives_a_copy_and_generation() -> None:
    for case in ("opt", "t5", "llama"):
        model = make(case)
        ids = inputs(case)["input_ids"][:1]
        # Without a cache for T5: transformers' has a place for as many layers as the encoder has.
        how = {"max_new_tokens": 5, "do_sample": False, "use_cache": case != "t5"}
        plain = model.generate(ids, **how)
        convert(model, CONFIG)
        twin = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(twin.generate(ids, **how), plain)
        assert layers_of(twin)[0].ssd.up_projection is not layers_of(model)[0].ssd.up_projection
        set_mode(twin, "sparse")
        assert layers_of(model)[0].ssd.mode == "dense"
        twin.generate(ids, **how)


@pytest.mark.parametrize("case", ["gpt2", "opt", "bert", "roberta", "xlm-roberta", "electra", "bart-decoder"])
def test_a_model_takes_as_many_tokens_as_it_is_said_to_and_no_more(case: str) -> None:
    model, batch = make(case), {key: value for key, value in inputs(case).items() if key == "use_cache"}
    positions = positions_of(model)
    assert positions is not None
    with torch.no_grad():
        model(input_ids=torch.full((1, positions), 5), **batch)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, positions + 1), 5), **batch)


def test_relative_positions_have_no_end() -> None:
    assert positions_of(make("t5")) is None
