"""Another activation becomes ReLU: in the config, and in training, which is in float32 whatever the weights are in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapt.checkpoints import Checkpoint, converted
from families.models import make
from transformers import BloomConfig, BloomForCausalLM

from switchable import InputError, SwitchConfig, convert
from switchable.adapt.relufy import with_relu
from switchable.ffn.convert import is_router_parameter, layers_of
from switchable.ffn.table import row_of
from switchable.store.load import load, load_pretrained
from switchable.train.optim import in_float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_half_precision_trains_in_float32(
    checkpoint: Checkpoint, corpus: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """It comes to the weights of float32 training, rounded once, and is saved as it was."""
    folder = checkpoint("gpt2", "gelu")
    half = load_pretrained(folder).to(dtype)
    half.save_pretrained(folder)
    steps = ("--relufy", "6", "--relufy-learning-rate", "1e-3", "--structure", "weights")
    assert converted(folder, corpus, tmp_path, *steps) == 0
    found, _ = load(tmp_path / "out")
    half.float().save_pretrained(folder)
    assert converted(folder, corpus, tmp_path, *steps, "--overwrite") == 0
    expected, _ = load(tmp_path / "out")
    assert found.config.dtype == dtype
    ours, theirs = (
        {n: p for n, p in model.named_parameters() if not is_router_parameter(n) and "mlp" not in n}
        for model in (found, expected)
    )
    assert len(ours) > 10
    for name, tensor in ours.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, theirs[name].to(dtype)), name
    assert {p.dtype for n, p in found.named_parameters() if is_router_parameter(n)} == {torch.float32}


def test_weights_are_float32_for_a_while_and_then_what_each_was() -> None:
    model = make("t5").bfloat16()
    model.encoder.block[0].layer[1].DenseReluDense.wo.float()  # T5 keeps its output projections in float32
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()}
    with in_float32(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.lm_head.weight is model.shared.weight
    assert model.lm_head.weight is model.shared.weight
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name][0], name
        assert torch.equal(tensor, before[name][1])


@pytest.mark.parametrize(
    ("case", "setting", "value"),
    [
        ("bert-chunked-gelu", "hidden_act", "relu"),
        ("llama-silu-tied", "hidden_act", "relu"),
        ("gelu-gated-t5", "feed_forward_proj", "gated-relu"),
    ],
)
def test_relu_in_the_config(case: str, setting: str, value: str) -> None:
    model = make("t5-gated" if case == "gelu-gated-t5" else case)
    if case == "gelu-gated-t5":
        model.config.feed_forward_proj = "gated-gelu"
    changed = with_relu(model.config, row_of(model))
    assert getattr(changed, setting) == value
    again = type(model)(changed)
    convert(again, SwitchConfig(num_experts=8, experts_per_token=2))
    assert {layer.ssd.settings.activation for layer in layers_of(again)} == {"relu"}
    with pytest.raises(InputError, match="already: leave out --relufy"):
        with_relu(changed, row_of(model))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({}, "the config of bloom has no hidden_act to set to ReLU"),
        ({"hidden_act": "gelu"}, "hidden_act of the config does not set the activation, which stays gelu"),
    ],
)
def test_a_model_whose_config_has_no_say_in_its_activation(
    checkpoint: Checkpoint,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    setting: dict[str, str],
    says: str,
) -> None:
    folder = checkpoint()
    rows = load_pretrained(folder).config.vocab_size
    BloomForCausalLM(
        BloomConfig(vocab_size=rows, hidden_size=16, n_layer=2, n_head=2, **setting)
    ).save_pretrained(folder)
    assert converted(folder, corpus, tmp_path, "--relufy", "5") == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
