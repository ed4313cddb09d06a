"""`switchable convert`: the dense function stays, routers learn to catch the mass, and what is told is true."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families.models import make
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM

from switchable import InputError, SwitchConfig, convert, set_mode
from switchable.adapt.calibrate import calibrate
from switchable.adapt.config import AdaptConfig
from switchable.adapt.relufy import with_relu
from switchable.adapt.table import LayerRow, Losses, as_text, layer_rows, losses
from switchable.cli import main
from switchable.data.tokenizers import train_bpe
from switchable.ffn.builders import build_model
from switchable.ffn.convert import is_router_parameter, layers_of
from switchable.ffn.table import row_of
from switchable.infer.generate import write
from switchable.store.load import load, load_pretrained
from switchable.train.optim import in_float32

SIZES = {"d_model": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "max_positions": 32}
SMALL = [
    "--num-experts", "8", "--sequence-length", "32", "--structure-tokens", "1024", "--calibration-tokens", "4096",
    "--eval-tokens", "1024", "--threads", "1", "--quiet",
]  # fmt: skip
Checkpoint = Callable[..., Path]


def sparse_ffns(model: nn.Module) -> nn.Module:
    """Make about a tenth of the activations non-zero, on inputs of about unit size."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("c_fc.weight", "intermediate.dense.weight", "wi.weight", "wi_0.weight")):
                parameter.normal_(std=0.3)
            if name.endswith(("c_fc.bias", "intermediate.dense.bias")):
                parameter.fill_(-1.5)
            if name.endswith(("c_proj.weight", "output.dense.weight", "wo.weight")):
                parameter.normal_(std=0.2)
    return model


@pytest.fixture
def checkpoint(corpus: Path, tmp_path: Path) -> Checkpoint:
    """Writes the checkpoint of a small model with a tokenizer of its own."""

    def make_checkpoint(family: str = "gpt2", activation: str = "relu") -> Path:
        objective = {"bert": "masked", "t5": "span"}.get(family, "causal")
        texts = [path.read_text() for path in sorted(corpus.iterdir())]
        tokenizer = train_bpe(texts, 400, objective)
        tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id or 0}
        torch.manual_seed(1)
        model = sparse_ffns(build_model(family, SIZES, activation, len(tokenizer), tokens))
        folder = tmp_path / f"{family}-{activation}"
        model.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(str(folder))
        return folder

    return make_checkpoint


def ids_for(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(10, model.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids}


def converted(folder: Path, corpus: Path, tmp_path: Path, *flags: str) -> int:
    out = tmp_path / "out"
    cache = tmp_path / "cache"
    return main(
        [
            "convert",
            str(folder),
            "--data",
            str(corpus),
            "--out",
            str(out),
            "--cache",
            str(cache),
            *SMALL,
            *flags,
        ]
    )


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_a_checkpoint_becomes_switchable(
    checkpoint: Checkpoint, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    folder = checkpoint(family)
    flags = ["--max-activation-ratio", "1.0"] if family == "t5" else []
    assert converted(folder, corpus, tmp_path, *flags) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["ffns"] == len(figures["layers"]) == (4 if family == "t5" else 2)
    assert figures["experts_per_token"] == 2
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == figures
    plain, (model, tokenizer) = load_pretrained(folder), load(tmp_path / "out")
    batch = ids_for(plain)
    before, after = plain(**batch).logits, model(**batch).logits
    assert ((after - before).norm() / before.norm()).item() < 1e-5
    assert tokenizer is not None
    assert [layer.ssd.experts_per_token for layer in layers_of(model)] == [2] * figures["ffns"]
    assert figures["loss_dense"] > 0
    assert set(figures["loss_sparse"]) == {"1/8", "1/4", "1/2"}
    for row in figures["layers"]:
        assert 0 < row["mass_caught"] <= row["mass_best"] <= 1
    if family == "gpt2":
        assert all(row["takes_part"] for row in figures["layers"])
        assert write(model, tokenizer, "the cat", "sparse").text.startswith("the cat")


def test_calibration_trains_the_routers_and_nothing_else() -> None:
    model = sparse_ffns(make("gpt2"))
    convert(model, SwitchConfig(num_experts=8, experts_per_token=2))
    set_mode(model, "sparse", 3)
    for layer in layers_of(model):
        nn.init.zeros_(layer.router.weight)
    batches = [
        {"input_ids": torch.randint(3, 61, (8, 32), generator=torch.Generator().manual_seed(i))}
        for i in range(16)
    ]
    before = {n: t.clone() for n, t in model.named_parameters()}
    caught = [row.mass_caught for row in layer_rows(model, batches)]
    seen: list[int] = []
    steps = calibrate(model, batches, 3e-2, advance=seen.append)
    assert steps == 4 * 8  # epochs x minibatches of 512 among 16 x 256 tokens
    assert seen == [1] * 16 + [16] * 4  # shown, then four epochs
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]) != is_router_parameter(name), name
    assert all(
        now.mass_caught > max(then + 0.05, 0.97 * now.mass_best)
        for now, then in zip(layer_rows(model, batches), caught, strict=True)
    )
    assert [(layer.ssd.mode, layer.ssd.experts_per_token) for layer in layers_of(model)] == [
        ("sparse", 3)
    ] * 2
    assert not model.training
    assert all(p.grad is None for n, p in model.named_parameters() if not is_router_parameter(n))


def test_the_figures_by_hand() -> None:
    model = sparse_ffns(make("gpt2"))
    convert(model, SwitchConfig(num_experts=4, experts_per_token=1))
    layer = layers_of(model)[1]
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    rows: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _m, args: rows.append(args[0][0]))
    model(**batch)
    hook.remove()
    active, caught, best, mass = 0, 0.0, 0.0, 0.0
    weights = layer.ssd.weights
    up_FD, bias_F, down_FD = weights.up_FD.detach(), weights.up_bias_F.detach(), weights.down_FD.detach()
    for x in rows[0].detach():
        hidden = [max(0.0, float(w @ x + b)) for w, b in zip(up_FD, bias_F, strict=True)]
        masses = [hidden[i] * float(down_FD[i].norm()) for i in range(64)]
        experts = [sum(masses[16 * e : 16 * e + 16]) for e in range(4)]
        active += sum(h > 0 for h in hidden)
        caught += experts[int(layer.router(x[None]).argmax())]
        best += max(experts)
        mass += sum(experts)
    row = layer_rows(model, [batch])[1]
    assert row.activation_ratio == active / (3 * 64)
    assert row.mass_caught == pytest.approx(caught / mass, rel=1e-5)
    assert row.mass_best == pytest.approx(best / mass, rel=1e-5)


def test_losses_are_taken_at_an_eighth_a_quarter_and_half_of_the_experts() -> None:
    model = sparse_ffns(make("gpt2"))
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    validation = [ids_for(model)]
    found = losses(model, validation)
    twin = copy.deepcopy(model)
    for name, k in (("1/8", 1), ("1/4", 2), ("1/2", 4)):
        set_mode(twin, "sparse", k)
        assert found.sparse[name] == pytest.approx(twin(**validation[0]).loss.item(), rel=1e-6)
    set_mode(twin, "dense")
    assert found.dense == pytest.approx(twin(**validation[0]).loss.item(), rel=1e-6)
    assert layers_of(model)[0].ssd.experts_per_token == 3


def test_the_table() -> None:
    rows = [LayerRow("h.0.mlp", 16, 0.39, 0.64, 0.65, False), LayerRow("h.1.mlp", 8, 0.06, 0.95, 0.96, True)]
    text = as_text(rows, Losses(2.0, {"1/8": 2.1, "1/4": 2.02}), 32)
    assert text.splitlines() == [
        "FFN      active  K of 32    caught  best choice  sparse mode",
        "h.0.mlp   0.390         16   0.640        0.650  stays dense",
        "h.1.mlp   0.060          8   0.950        0.960  sparse",
        "loss, nats per token: dense 2.0000; K/E = 1/8 2.1000 (+5.0 %), K/E = 1/4 2.0200 (+1.0 %)",
    ]


def test_a_model_that_is_not_sparse(
    checkpoint: Checkpoint, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint("gpt2", "gelu")
    assert converted(folder, corpus, tmp_path) == 2
    message = capsys.readouterr().err
    assert "(gelu) are not sparse: in each of its 2 FFNs at least" in message
    assert all(
        part in message
        for part in ("dense ", "K/E = 1/8 ", "K/E = 1/4 ", "--relufy 1000", "--keep-activation")
    )
    assert not (tmp_path / "out").exists()
    assert converted(folder, corpus, tmp_path, "--keep-activation") == 0
    assert load(tmp_path / "out")[0].config.activation_function == "gelu"
    assert converted(folder, corpus, tmp_path, "--relufy", "6", "--overwrite") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures["relufy"]) == {"steps", "loss_before", "loss_swapped", "loss_after"}
    model, _ = load(tmp_path / "out")
    assert model.config.activation_function == "relu"
    assert layers_of(model)[0].ssd.settings.activation == "relu"


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


def test_bad_input(
    checkpoint: Checkpoint, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Path, *flags: str) -> str:
        assert converted(folder, corpus, tmp_path, *flags) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    folder = checkpoint()
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "num_experts=10 does not divide d_ff=64" in refused(folder, "--num-experts", "10")
    assert "experts_per_token=9 is not possible with num_experts=8" in refused(
        folder, "--experts-per-token", "9"
    )
    assert "structure='magic' is not known" in refused(folder, "--structure", "magic")
    assert "relu already: leave out --relufy" in refused(folder, "--relufy", "5")
    assert "give one of them" in refused(folder, "--relufy", "5", "--keep-activation")
    assert "no-such-file" in refused(folder, "--data", str(tmp_path / "no-such-file"))
    vit = tmp_path / "vit"
    make("vit").save_pretrained(vit)
    assert "ViTForImageClassification, which predicts no text" in refused(vit)
    big = train_bpe([path.read_text() for path in corpus.iterdir()], 900)
    config = json.loads((folder / "config.json").read_text())
    big.save_pretrained(str(folder))
    if len(big) > config["vocab_size"]:
        assert "they do not belong together" in refused(folder)
    make("llama").save_pretrained(tmp_path / "bare")
    assert "no tokenizer in the folder" in refused(tmp_path / "bare")


def test_settings_are_checked() -> None:
    for settings, message in (
        ({"relufy": -1}, "relufy=-1"),
        ({"calibration_tokens": 0}, "calibration_tokens=0"),
        ({"router_learning_rate": 0.0}, "router_learning_rate"),
        ({"max_activation_ratio": 0.0}, "max_activation_ratio"),
    ):
        with pytest.raises(InputError, match=message):
            AdaptConfig(**settings)
    assert AdaptConfig(num_experts=3).default_k == 1


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
