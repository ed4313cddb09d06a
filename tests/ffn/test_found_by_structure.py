"""FFNs of models that nobody has described: found, and converted without a change of the function."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from ffn.home_made import NEURONS, SUPPORTED, Fused, InLayer, Projections, make
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from switchable import Family, SwitchConfig, convert, set_mode
from switchable.ffn.convert import is_router_parameter, layers_of
from switchable.ffn.description import describe
from switchable.ffn.layout import entries
from switchable.switching.optimizers import optimizers_in
from switchable.switching.switch import regroup

CONFIG = SwitchConfig(num_experts=8, experts_per_token=3, backend="reference")


def ids() -> Tensor:
    return torch.randint(0, 31, (3, 10), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model: nn.Module, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """With the same random numbers every time."""
    model.train(training)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    logits, loss = model(ids(), targets=ids().roll(-1, 1))
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {n: g for n, g in grads.items() if not is_router_parameter(n)}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SUPPORTED)
def test_conversion_changes_neither_function_nor_gradient(name: str, training: bool) -> None:
    model = make(SUPPORTED[name])
    before, grads = loss_and_gradients(copy.deepcopy(model), training)
    values = {n: t.clone() for n, t in model.state_dict().items()}
    report = convert(model, CONFIG, neuron_major=False)  # which rounds otherwise
    assert report.converted == 2
    assert report.d_ff == NEURONS
    kept = {n: t for n, t in model.state_dict().items() if not is_router_parameter(n)}
    assert list(kept) == list(values)
    assert all(torch.equal(kept[n], values[n]) for n in values)
    after, after_grads = loss_and_gradients(model, training)
    assert torch.equal(after, before)
    assert list(after_grads) == list(grads)
    for n, grad in grads.items():
        torch.testing.assert_close(after_grads[n], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SUPPORTED)
def test_all_experts_on_is_dense_and_one_is_not(name: str) -> None:
    model = make(SUPPORTED[name])
    convert(model, CONFIG)
    dense, grads = loss_and_gradients(model, training=False)
    set_mode(model, "sparse", experts_per_token=8)
    sparse, sparse_grads = loss_and_gradients(model, training=False)
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-5)
    for n, grad in grads.items():
        torch.testing.assert_close(sparse_grads[n], grad, rtol=1e-4, atol=1e-6)
    set_mode(model, "sparse", experts_per_token=1)
    assert (loss_and_gradients(model, training=False)[0] - dense).abs().max() > 1e-3


@pytest.mark.parametrize("name", SUPPORTED)
def test_training_goes_on_after_a_regrouping_as_if_the_neurons_had_not_moved(name: str) -> None:
    model = make(SUPPORTED[name])
    convert(model, CONFIG)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        loss_and_gradients(m, training=False)
        optimizer.step()
    generator = torch.Generator().manual_seed(2)
    labels = [(torch.arange(NEURONS) % 8)[torch.randperm(NEURONS, generator=generator)] for _ in range(2)]
    perms = regroup(layers_of(model), labels, optimizers_in(optimizers[0]))
    assert all(perm is not None for perm in perms)
    for _ in range(2):
        logits = [loss_and_gradients(m, training=False)[0] for m in (model, twin)]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize(("name", "rows"), [("Fused", (3, NEURONS + 3)), ("Interleaved", (6, 7))])
def test_rows_of_a_fused_projection_move_in_pairs(name: str, rows: tuple[int, int]) -> None:
    """Neuron 3 goes to the front: its gate row and its up row, wherever they lie."""
    model = make(SUPPORTED[name])
    convert(model, CONFIG)
    order = entries(layers_of(model)[0], torch.tensor([3, 1, 2, 0, *range(4, NEURONS)]), 2 * NEURONS)
    assert tuple(order[[0, NEURONS] if name == "Fused" else [0, 1]].tolist()) == rows
    assert sorted(order.tolist()) == list(range(2 * NEURONS))


def test_what_is_found_is_said_in_the_users_words() -> None:
    found = {}
    for name in ("Projections", "InLayer", "UpFirst", "DropsOut", "DropsOutInLayer", "DropsOutByNumber"):
        model = make(SUPPORTED[name])
        convert(model, CONFIG)
        found[name] = layers_of(model)[0].ssd.settings.family
    assert (found["Projections"].ffn, found["Projections"].up, found["Projections"].down) == (
        "Projections", "up", "down")  # fmt: skip
    assert (found["Projections"].activation, found["Projections"].activation_fn) == (None, "relu2")
    assert not found["Projections"].in_layer
    assert found["InLayer"].in_layer
    assert (found["UpFirst"].fused, found["UpFirst"].gate, found["UpFirst"].up) == ("up-gate", "both", "both")
    assert (found["DropsOut"].hidden_dropout, found["DropsOut"].dropout) == ("inside", "behind")
    assert found["DropsOutInLayer"].hidden_dropout == "inside"
    assert found["DropsOutByNumber"].hidden_dropout == "dropout"


def test_a_model_whose_layers_differ() -> None:
    kinds: Iterator[Callable[[], nn.Module]] = iter([Projections, InLayer])
    model = make(lambda: next(kinds)())
    before = model(ids())[0]
    report = convert(model, CONFIG, neuron_major=False)
    assert report.names == ("h.0", "h.1")
    assert torch.equal(model(ids())[0], before)


def test_the_models_own_batch_is_taken_where_none_can_be_made() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make(Projections)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.inner(left)[0] + self.inner(right)[0]

    model = TwoInputs()
    for given in ((ids(), ids()), {"left": ids(), "right": ids()}):
        assert convert(copy.deepcopy(model), CONFIG, example_inputs=given).converted == 2


def test_two_sides_need_no_config() -> None:
    class TwoSides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make(Projections)

        def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
            return torch.cat([self.inner(input_ids)[0], self.inner(decoder_input_ids)[0]], dim=1)

    assert convert(TwoSides(), CONFIG).converted == 2


def test_an_image_need_not_be_square() -> None:
    class Pixels(nn.Sequential):
        config = SimpleNamespace(num_channels=1, image_size=(4, 8))

        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values + self[0](pixel_values)

    model = Pixels(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)))
    assert convert(model, CONFIG).converted == 1


@pytest.mark.parametrize("name", ["InLayer", "Gated", "FusedInLayer"])
def test_an_output_kept_for_the_exit_survives_checkpointing_threads_and_compiling(name: str) -> None:
    model = make(SUPPORTED[name])
    convert(model, CONFIG)
    layer = model.h[0]
    inputs = [torch.randn(5, 8, generator=torch.Generator().manual_seed(s)) for s in range(16)]
    with torch.no_grad():
        expected = [layer(x) for x in inputs]
        with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for y, wanted in zip(
                pool.map(lambda x: _without_gradients(layer, x), inputs), expected, strict=True
            ):
                assert torch.equal(y, wanted)
    x = inputs[0].clone().requires_grad_()
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    for reentrant in (False, True):
        y = checkpoint(layer, x, use_reentrant=reentrant)
        x.grad = None
        y.square().sum().backward()
        torch.testing.assert_close(x.grad, plain)
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(inputs[0]), expected[0])


def _without_gradients(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def test_casting_projections_in_bfloat16() -> None:
    model = make(SUPPORTED["Casts"])
    model.embedding.bfloat16()
    model.head.bfloat16()
    for attention in model.attention:
        attention.bfloat16()
    before = model(ids())[0]
    convert(model, CONFIG)
    assert torch.equal(model(ids())[0], before)
    set_mode(model, "sparse", experts_per_token=8)
    assert (model(ids())[0] - before).abs().max() < 0.05 * before.abs().max()


def test_families_that_differ_are_described_and_opened() -> None:
    def unlike() -> nn.Module:
        kinds: Iterator[Callable[[], nn.Module]] = iter([Projections, Fused])
        return make(lambda: next(kinds)())

    model, other = unlike(), unlike()
    convert(model, CONFIG)
    kept = json.dumps([describe(layer.ssd)["family"] for layer in layers_of(model)])
    convert(other, CONFIG, [Family.from_values(each) for each in json.loads(kept)], trusted=True)
    families = [[layer.ssd.settings.family for layer in layers_of(m)] for m in (model, other)]
    assert families[0] == families[1]
    assert families[0][0] != families[0][1]
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids())[0], model(ids())[0])


def test_a_model_of_large_matrices_alone() -> None:
    """No norm, no bias: nothing in it is small."""

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(192, 768, bias=False), nn.Linear(768, 192, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(torch.relu(self.up(x)).square())
            return y

    torch.manual_seed(0)
    model, x = nn.Sequential(Alone()), torch.randn(2, 5, 192)
    before, kept = model(x), copy.deepcopy(model.state_dict())
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3), example_inputs=x)
    assert torch.allclose(model(x), before, atol=1e-5)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in kept.items())
