"""Models of transformers that have no row in the table: converted all the same, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from switchable import Family, InputError, SwitchConfig, convert, set_mode
from switchable.ffn.convert import is_router_parameter, layers_of
from switchable.ffn.table import FAMILIES
from switchable.switching.switch import regroup

CONFIG = SwitchConfig(num_experts=8, experts_per_token=3, backend="reference")
TOKENS = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NEW = {
    **TOKENS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
OLD = {**TOKENS, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4,
       "activation_function": "relu"}  # fmt: skip
TWO_SIDES = {
    **TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
    "decoder_start_token_id": 1, "activation_function": "relu", "activation_dropout": 0.2,
}  # fmt: skip
T5 = {
    **TOKENS,
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "decoder_start_token_id": 0,
}
FALCON = {n: v for n, v in NEW.items() if n != "head_dim"} | {"ffn_hidden_size": 64}
BERT = {**NEW, "hidden_act": "relu"}

CASES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    # name: model class, config class, settings, FFNs
    "nanochat": ("NanoChatForCausalLM", "NanoChatConfig", NEW, 2),
    "jais2": ("Jais2ForCausalLM", "Jais2Config", NEW, 2),
    "persimmon": ("PersimmonForCausalLM", "PersimmonConfig", NEW, 2),
    "nllb": ("M2M100ForConditionalGeneration", "M2M100Config", TWO_SIDES, 4),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", TWO_SIDES, 4),
    "marian": ("MarianMTModel", "MarianConfig", {**TWO_SIDES, "forced_eos_token_id": None}, 4),
    "longt5": ("LongT5ForConditionalGeneration", "LongT5Config", {**T5, "feed_forward_proj": "relu"}, 4),
    "xglm": ("XGLMForCausalLM", "XGLMConfig", {**TOKENS, "d_model": 32, "ffn_dim": 64, "num_layers": 2,
             "attention_heads": 4, "max_position_embeddings": 64, "activation_function": "relu"}, 2),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**FALCON, "activation": "relu"}, 2),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", {**NEW, "num_layers": 2, "num_heads": 4,
                "attention_types": [[["global", "local"], 1]], "activation_function": "relu"}, 2),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", OLD, 2),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", {**NEW, "hidden_act": "relu"}, 2),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", {**TOKENS, "dim": 32, "hidden_dim": 64, "n_layers": 2,
                   "n_heads": 4, "max_position_embeddings": 64, "activation": "relu"}, 2),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**BERT, "embedding_size": 16}, 1),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {**TWO_SIDES, "num_mel_bins": 8,
                "max_source_positions": 32, "max_target_positions": 32, "begin_suppress_tokens": None}, 4),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {**NEW, "hidden_act": "relu",
                   "residual_dropout": 0.2}, 2),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**NEW, "hidden_act": "relu"}, 2),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**NEW, "hidden_act": "relu"}, 2),
    "glm": ("GlmForCausalLM", "GlmConfig", {**NEW, "hidden_act": "relu"}, 2),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", {**NEW, "hidden_activation": "relu",
                   "mlp_dropout": 0.2, "cls_token_id": 1, "sep_token_id": 2}, 2),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**TOKENS, "hidden_size": 16, "n_layer": 2, "n_head": 4}, 2),
    "xlm": ("XLMWithLMHeadModel", "XLMConfig", {"vocab_size": 61, "emb_dim": 16, "n_layers": 2, "n_heads": 4,
            "max_position_embeddings": 64, "gelu_activation": False}, 2),
    "openai-gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", {"vocab_size": 61, "n_embd": 16, "n_layer": 2,
                   "n_head": 4, "n_positions": 64}, 2),
}  # fmt: skip


def make(case: str) -> nn.Module:
    name, config, settings, _ = CASES[case]
    torch.manual_seed(0)
    model: nn.Module = getattr(hf, name)(getattr(hf, config)(**settings))
    assert model.config.model_type not in FAMILIES
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.any():  # nanochat's output projections begin at zero
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def inputs(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (2, 12), generator=generator)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 64, generator=generator), "decoder_input_ids": ids[:, :6]}
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :6]} if model.config.is_encoder_decoder else {})


def logits_and_gradients(model: nn.Module, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """With the same random numbers every time."""
    model.train(training)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    logits = model(**inputs(model)).logits
    logits.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {n: g for n, g in grads.items() if not is_router_parameter(n)}


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("case", CASES)
def test_conversion_changes_neither_function_nor_gradient_nor_weights(case: str) -> None:
    model = make(case)
    plain, values = copy.deepcopy(model), {n: t.clone() for n, t in model.state_dict().items()}
    rng = torch.get_rng_state()
    assert convert(model, CONFIG, neuron_major=False).converted == CASES[case][3]
    assert torch.equal(torch.get_rng_state(), rng)
    kept = {n: t for n, t in model.state_dict().items() if not is_router_parameter(n)}
    assert list(kept) == list(values)
    assert all(torch.equal(kept[n], values[n]) for n in values)
    for training in (False, True):
        (before, grads), (after, after_grads) = (logits_and_gradients(m, training) for m in (plain, model))
        assert apart(after, before) < 1e-6
        assert list(after_grads) == list(grads)
        for n, grad in grads.items():
            assert apart(after_grads[n], grad) < 1e-5 or grad.abs().max() < 1e-6, n


@pytest.mark.parametrize("case", CASES)
def test_all_experts_on_is_dense_and_regrouping_leaves_the_logits(case: str) -> None:
    model = make(case)
    convert(model, CONFIG)
    dense, grads = logits_and_gradients(model, training=False)
    set_mode(model, "sparse", experts_per_token=8)
    sparse, sparse_grads = logits_and_gradients(model, training=False)
    assert apart(sparse, dense) < 1e-5
    for n, grad in grads.items():
        assert apart(sparse_grads[n], grad) < 1e-4 or grad.abs().max() < 1e-6, n
    set_mode(model, "sparse", experts_per_token=1)
    assert apart(logits_and_gradients(model, training=False)[0], dense) > 1e-5
    set_mode(model, "dense")
    layers = layers_of(model)
    generator = torch.Generator().manual_seed(3)
    labels = [
        (torch.arange(each.ssd.d_ff) % 8)[torch.randperm(each.ssd.d_ff, generator=generator)]
        for each in layers
    ]
    assert all(perm is not None for perm in regroup(layers, labels))
    assert apart(logits_and_gradients(model, training=False)[0], dense) < 1e-5


@pytest.mark.parametrize("case", ["nllb", "phi3", "xlm", "modernbert"])
def test_what_was_found_opens_another_copy_without_looking_again(case: str) -> None:
    """As JSON, which is how it is kept with a model; the copy has no numbers yet."""
    model = make(case)
    convert(model, CONFIG)
    kept = json.dumps([dataclasses.asdict(layer.ssd.settings.family) for layer in layers_of(model)])
    families = list(dict.fromkeys(Family.from_values(values) for values in json.loads(kept)))
    name, config, settings, _ = CASES[case]
    with torch.device("meta"):
        other = getattr(hf, name)(getattr(hf, config)(**settings))
    convert(other, CONFIG, families)
    assert [layer.ssd.settings for layer in layers_of(other)] == [
        layer.ssd.settings for layer in layers_of(model)
    ]
    assert list(other.state_dict()) == list(model.state_dict())


def test_bitnet_is_refused_by_name() -> None:
    model = hf.BitNetForCausalLM(hf.BitNetConfig(**NEW))
    with pytest.raises(InputError, match=r"mlp\.ffn_sub_norm \(BitNetRMSNorm\) has parameters"):
        convert(model, CONFIG)


def test_a_mixture_of_experts_is_refused_by_name() -> None:
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**NEW, num_local_experts=2))
    with pytest.raises(
        InputError, match=r"model\.layers\.0\.mlp\.experts \(MixtralExperts\) is a mixture of experts"
    ):
        convert(model, CONFIG)


def test_torchs_own_encoder_layer_does_not_pass_by_sparse_mode_in_evaluation() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval().requires_grad_(requires_grad=False)
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        before = model(x)
        assert convert(model, CONFIG).converted == 2
        torch.testing.assert_close(model(x), before)
        set_mode(model, "sparse", experts_per_token=1)
        assert apart(model(x), before) > 1e-3
