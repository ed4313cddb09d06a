"""One set of weights, two multiplications: dense mode is the old model, sparse mode with all experts is dense mode."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from families.models import make
from support import HomeMade, relative_error
from torch import Tensor, nn

from switchable import Family, InputError, SwitchConfig, convert, in_mode, set_mode
from switchable.compute.estimate import estimated_mass
from switchable.ffn.convert import is_router_parameter, layers_of, shown_mode
from switchable.ffn.layer import ESTIMATED_TOKEN_FRACTION, SPARSE_TOKEN_FRACTION, SwitchableFFN

Make = Callable[..., nn.Module]


def loss_and_gradients(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    return out.logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu"])
def test_conversion_changes_no_logits_and_no_gradient(
    make_gpt2: Make, tokens: Tensor, activation: str
) -> None:
    model = make_gpt2(activation)
    plain_logits, plain_grads = loss_and_gradients(copy.deepcopy(model), tokens)
    report = convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    logits, grads = loss_and_gradients(model, tokens)
    assert str(report).startswith("2 of 2 FFNs are switchable: 8 experts of 8 neurons; ")
    assert ("gelu: zero almost nowhere" in str(report)) == (activation == "gelu")
    assert torch.equal(logits, plain_logits)
    for name, grad in plain_grads.items():
        assert torch.equal(grads[name], grad), name
    routers = set(grads) - set(plain_grads)
    assert routers == {f"transformer.h.{i}.mlp.router.{p}" for i in (0, 1) for p in ("weight", "bias")}


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_all_experts_on_equals_dense(make_gpt2: Make, tokens: Tensor, activation: str, backend: str) -> None:
    model = make_gpt2(activation)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3, backend=backend))
    dense_logits, dense_grads = loss_and_gradients(model, tokens)
    set_mode(model, "sparse", experts_per_token=8)
    logits, grads = loss_and_gradients(model, tokens)
    assert relative_error(logits, dense_logits) < 1e-5
    for name, grad in dense_grads.items():
        if not is_router_parameter(name):
            assert relative_error(grads[name], grad) < 1e-5, name


def test_fewer_experts_differ_and_leave_unselected_ones_without_gradient(
    make_gpt2: Make, tokens: Tensor
) -> None:
    model = make_gpt2(layers=1)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=1))
    dense, _ = loss_and_gradients(model, tokens)
    set_mode(model, "sparse")
    layer = layers_of(model)[0]
    with torch.no_grad():
        layer.router.bias[5] = 100.0  # every token now chooses expert 5 alone
    logits, grads = loss_and_gradients(model, tokens)
    assert relative_error(logits, dense) > 1e-3
    per_neuron = grads["transformer.h.0.mlp.c_fc.weight"].norm(dim=0).view(8, 8)
    assert (per_neuron[5] > 0).any()
    assert per_neuron[[0, 1, 2, 3, 4, 6, 7]].abs().max() == 0


def all_experts_after_a_dense_step(
    make_gpt2: Make, tokens: Tensor, router_token_fraction: float
) -> tuple[nn.Module, SwitchableFFN, dict[str, Tensor]]:
    """A model in sparse mode, its layer, and the gradients of a dense step in which so many tokens teach the router."""
    model = make_gpt2(layers=1)
    settings = {"num_experts": 8, "experts_per_token": 8, "router_token_fraction": router_token_fraction}
    convert(model, SwitchConfig(**settings))
    _, dense = loss_and_gradients(model, tokens)
    set_mode(model, "sparse")
    return model, layers_of(model)[0], dense


def test_a_few_tokens_of_a_sparse_step_teach_the_router_what_a_dense_step_would(
    make_gpt2: Make, tokens: Tensor
) -> None:
    """With all experts on, both modes see the same tokens: their routers' gradients are the same, and no others."""
    model, layer, dense = all_experts_after_a_dense_step(make_gpt2, tokens, SPARSE_TOKEN_FRACTION)
    layer.ssd.router_learns = False
    _, alone = loss_and_gradients(model, tokens)
    layer.ssd.router_learns = True
    logits, taught = loss_and_gradients(model, tokens)
    name = "transformer.h.0.mlp.router.weight"
    assert name not in alone
    assert relative_error(taught[name], dense[name]) < 1e-5
    for other, grad in alone.items():
        assert torch.equal(taught[other], grad), other
    model.eval()
    assert torch.equal(model(input_ids=tokens).logits, logits)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_training_step_takes_the_experts_of_most_mass_without_the_router(family: str) -> None:
    model = make(family).train()
    for dropout in (each for each in model.modules() if isinstance(each, nn.Dropout)):
        dropout.p = 0.0
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    set_mode(model, "sparse")
    layer = layers_of(model)[0]
    ssd = layer.ssd
    ssd.estimates = True
    x = torch.randn(4, 24, ssd.d_model, requires_grad=True)
    y = layer(x)
    # By hand: the neurons of the three experts that hold most mass, as 8 bits tell it.
    hidden = ssd.activations(x)
    mass = estimated_mass(x.detach().view(-1, ssd.d_model), ssd.weights, ssd.settings.activation, 8)
    kept = torch.zeros_like(mass).scatter(1, mass.topk(3).indices, 1.0).repeat_interleave(ssd.d_ff // 8, 1)
    expected = ssd.write(hidden * kept.view_as(hidden))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    model_parameters = [p for n, p in layer.named_parameters() if not is_router_parameter(f".{n}")]
    names = [x, *model_parameters]
    given, wanted = (torch.autograd.grad(out.square().sum(), names) for out in (y, expected))
    for one, other in zip(given, wanted, strict=True):
        assert relative_error(one, other) < 1e-4
    with torch.no_grad():  # what nothing is learned from goes by the router, which knows nothing yet
        layer.router.weight.zero_()
        layer.router.bias.copy_(torch.arange(8.0))
        assert relative_error(layer(x), expected) > 1e-2


def test_the_router_learns_the_mass_that_a_training_step_chose_by(make_gpt2: Make, tokens: Tensor) -> None:
    """Every eighth token teaches it, as in a dense step; of 8 bits is only what it learns."""
    model, layer, dense = all_experts_after_a_dense_step(make_gpt2, tokens, ESTIMATED_TOKEN_FRACTION)
    layer.ssd.estimates = True
    _, taught = loss_and_gradients(model, tokens)
    for name, grad in dense.items():
        assert relative_error(taught[name], grad) < (0.02 if is_router_parameter(name) else 1e-5), name
    layer.ssd.router_learns = False
    _, alone = loss_and_gradients(model, tokens)
    assert not any(map(is_router_parameter, alone))


def test_a_layer_that_does_not_take_part_stays_dense(switchable_gpt2: nn.Module) -> None:
    first, second = layers_of(switchable_gpt2)
    first.ssd.takes_part = False
    set_mode(switchable_gpt2, "sparse")
    assert (first.ssd.mode, second.ssd.mode) == ("dense", "sparse")


def test_parameters_keep_their_names(make_gpt2: Make) -> None:
    model = make_gpt2()
    before = dict(model.state_dict())
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    after = {n: t for n, t in model.state_dict().items() if not is_router_parameter(n)}
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_sparse_mode_keeps_less_memory_for_the_backward_than_dense(make_gpt2: Make) -> None:
    model = make_gpt2(layers=1)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=2, backend="fused"))
    layer = layers_of(model)[0]

    def saved_bytes(mode: str) -> int:
        set_mode(model, mode)
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(64, 32, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        return sum(kept.values())

    assert saved_bytes("sparse") < saved_bytes("dense")


@pytest.mark.parametrize("tokens_at_once", [1, 32])
def test_fewer_experts_where_a_token_needs_fewer(make_gpt2: Make, tokens_at_once: int) -> None:
    model = make_gpt2(layers=1).eval()
    convert(model, SwitchConfig(num_experts=8, experts_per_token=5))
    layer = layers_of(model)[0]
    x_TD = torch.randn(tokens_at_once, 16)
    shares_TE = layer.router(x_TD).softmax(-1)
    expected = []
    for x_D, shares_E in zip(
        x_TD, shares_TE, strict=True
    ):  # each token alone, with as many experts as it needs
        order = shares_E.argsort(descending=True)
        needed = 1 + int((shares_E[order].cumsum(0) < 0.4).sum())
        with in_mode(model, "sparse", min(needed, 5), mass=1.0), torch.no_grad():
            expected.append(layer(x_D.view(1, 1, -1))[0, 0])
    with in_mode(model, "sparse", mass=0.4):
        assert "mass=0.4" in repr(layer)
        assert (
            shown_mode(model, "sparse")
            == "sparse mode, K=up to 5 of 8 experts, those whose shares add up to 0.4"
        )
        with torch.no_grad():
            torch.testing.assert_close(layer(x_TD[None])[0], torch.stack(expected))
            torch.testing.assert_close(
                torch.compile(layer, backend="eager")(x_TD[None])[0], torch.stack(expected)
            )
        assert layer(x_TD[None].requires_grad_()).requires_grad  # it can be trained so as well
        saved = model.state_dict()
    assert layer.ssd.mass == 1.0
    model.load_state_dict(saved)
    assert layer.ssd.mass == 0.4  # like K it is saved with the router


def test_errors_say_what_to_do(make_gpt2: Make) -> None:
    with pytest.raises(
        InputError, match=r"num_experts=10 does not divide d_ff=64 of .*h\.0\.mlp; use one of .*8.*16"
    ):
        convert(make_gpt2(), SwitchConfig(num_experts=10, experts_per_token=3))
    model = make_gpt2()
    with pytest.raises(InputError, match="convert it first"):
        set_mode(model, "sparse")
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    with pytest.raises(InputError, match="converted already"):
        convert(model)
    with pytest.raises(InputError, match="mode='fast'"):
        set_mode(model, "fast")
    for wrong in (9, 0, 2.5, True, [3, 9]):
        with pytest.raises(
            InputError, match=r"experts_per_token=\S+ (is out of range; use|must be) a whole number"
        ):
            set_mode(model, "sparse", experts_per_token=wrong)
    for mass in (0, 1.5, "most", True):
        with pytest.raises(InputError, match=r"^mass="):
            set_mode(model, "sparse", mass=mass)
    assert all((layer.ssd.mode, layer.ssd.experts_per_token) == ("dense", 3) for layer in layers_of(model))


def test_a_model_gets_few_names_of_ours(switchable_gpt2: nn.Module) -> None:
    (layer, *_) = layers_of(switchable_gpt2)
    plain = set(vars(nn.Module())) | {"training"}
    assert {name for name in set(vars(layer)) - plain if not name.startswith("_")} == {"ssd"}
    ours = {name for name in dir(type(layer)) if not name.startswith("_")} - set(dir(nn.Module))
    assert ours == {"has_dense_mode", "router_passes"}
    assert set(dict(layer.named_children())) == {"c_fc", "c_proj", "act", "dropout", "router"}


def test_a_copy_has_a_state_of_its_own(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    twin = copy.deepcopy(switchable_gpt2).eval()
    dense = switchable_gpt2.eval()(input_ids=tokens).logits
    set_mode(twin, "sparse", experts_per_token=1)
    with torch.no_grad():
        layers_of(twin)[0].ssd.down_projection.weight.zero_()
    assert torch.equal(switchable_gpt2(input_ids=tokens).logits, dense)
    assert layers_of(twin)[0].ssd.up_projection is dict(layers_of(twin)[0].named_children())["c_fc"]


def test_an_unknown_model_is_described_in_three_words() -> None:
    model = HomeMade()
    x = torch.randn(5, 7, 6)
    before = model(x)
    with pytest.raises(InputError, match="found 0 of"):
        convert(
            model, SwitchConfig(num_experts=4, experts_per_token=2), Family(ffn="MLP", up="fc1", down="fc2")
        )
    report = convert(
        model, SwitchConfig(num_experts=4, experts_per_token=2), Family(ffn="MyMLP", up="fc1", down="fc2")
    )
    assert report.converted == 3
    assert (
        relative_error(model(x), before) < 1e-6
    )  # nn.Linear's `down` is stored the other way round: other roundings
    set_mode(model, "sparse", experts_per_token=4)
    assert relative_error(model(x), before) < 1e-5


@pytest.mark.parametrize("case", ["gpt2", "opt-post-norm", "llama-silu-tied"])  # with biases, without, gated
@pytest.mark.parametrize("how", ["dense", "active", "sparse"])
def test_a_model_may_add_to_the_output_in_place(case: str, how: str) -> None:
    def gradients(in_place: bool) -> list[Tensor]:
        model = make(case).train()
        convert(model, SwitchConfig(num_experts=8, experts_per_token=3, activation_l1=0.01))
        layer = layers_of(model)[0]
        layer.ssd.mode, layer.ssd.multiplies_active = (
            "sparse" if how == "sparse" else "dense",
            how == "active",
        )
        x = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(3))
        y = layer(x)
        y = y.add_(x) if in_place else y + x
        y.square().mean().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert layer.router.weight.grad is not None
        return found

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)
