"""A tiny random model of every family, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

BASE = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
HIDDEN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LLAMA = {**BASE, **HIDDEN, "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 8}
BERT = {**BASE, **HIDDEN, "max_position_embeddings": 40}
T5 = {
    **BASE, "d_model": 16, "d_ff": 64, "d_kv": 8, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 3,
    "decoder_start_token_id": 2,
}  # fmt: skip
BART = {
    **BASE, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32,
    "decoder_start_token_id": 2, "forced_eos_token_id": None, "activation_function": "relu",
}  # fmt: skip

CASES: dict[str, tuple[str, type, dict[str, Any], int]] = {
    # name: model class, config class, settings, number of FFNs
    "gpt2": ("GPT2LMHeadModel", hf.GPT2Config, {
        **BASE, "n_positions": 32, "n_embd": 16, "n_inner": 64, "n_layer": 2, "n_head": 2,
        "activation_function": "relu"}, 2),
    "opt": ("OPTForCausalLM", hf.OPTConfig, {
        **BASE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
        "max_position_embeddings": 32, "word_embed_proj_dim": 16}, 2),
    "opt-post-norm": ("OPTForCausalLM", hf.OPTConfig, {
        **BASE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
        "max_position_embeddings": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False,
        "enable_bias": False}, 2),
    "gpt_neox": ("GPTNeoXForCausalLM", hf.GPTNeoXConfig, {
        **BASE, **HIDDEN, "max_position_embeddings": 32, "hidden_act": "relu"}, 2),
    "phi": ("PhiForCausalLM", hf.PhiConfig, {
        **BASE, **HIDDEN, "max_position_embeddings": 32, "hidden_act": "relu"}, 2),
    "nemotron": ("NemotronForCausalLM", hf.NemotronConfig, {**LLAMA, "mlp_bias": True}, 2),
    "arcee": ("ArceeForCausalLM", hf.ArceeConfig, {**LLAMA, "mlp_bias": True}, 2),
    "llama": ("LlamaForCausalLM", hf.LlamaConfig, {**LLAMA, "hidden_act": "relu", "mlp_bias": True}, 2),
    "llama-silu-tied": ("LlamaForCausalLM", hf.LlamaConfig, {**LLAMA, "tie_word_embeddings": True}, 2),
    "mistral": ("MistralForCausalLM", hf.MistralConfig, {**LLAMA, "hidden_act": "relu"}, 2),
    "qwen2": ("Qwen2ForCausalLM", hf.Qwen2Config, {**LLAMA, "hidden_act": "relu"}, 2),
    "qwen3": ("Qwen3ForCausalLM", hf.Qwen3Config, {**LLAMA, "hidden_act": "relu"}, 2),
    "gemma": ("GemmaForCausalLM", hf.GemmaConfig, {**LLAMA, "hidden_act": "relu"}, 2),
    "gemma2": ("Gemma2ForCausalLM", hf.Gemma2Config, {**LLAMA, "hidden_activation": "relu"}, 2),
    "gemma3_text": ("Gemma3ForCausalLM", hf.Gemma3TextConfig, {**LLAMA, "hidden_activation": "relu"}, 2),
    "olmo2": ("Olmo2ForCausalLM", hf.Olmo2Config, {**LLAMA, "hidden_act": "relu"}, 2),
    "granite": ("GraniteForCausalLM", hf.GraniteConfig, {**LLAMA, "hidden_act": "relu", "mlp_bias": True}, 2),
    "smollm3": ("SmolLM3ForCausalLM", hf.SmolLM3Config, {**LLAMA, "hidden_act": "relu"}, 2),
    "bert": ("BertForMaskedLM", hf.BertConfig, {**BERT, "hidden_act": "relu"}, 2),
    "bert-classifier": ("BertForSequenceClassification", hf.BertConfig, {**BERT, "hidden_act": "relu"}, 2),
    "bert-chunked-gelu": ("BertForMaskedLM", hf.BertConfig, {**BERT, "chunk_size_feed_forward": 3}, 2),
    "roberta": ("RobertaForMaskedLM", hf.RobertaConfig, {**BERT, "hidden_act": "relu"}, 2),
    "xlm-roberta": ("XLMRobertaForMaskedLM", hf.XLMRobertaConfig, {**BERT, "hidden_act": "relu"}, 2),
    "electra": ("ElectraForMaskedLM", hf.ElectraConfig, {**BERT, "embedding_size": 16, "hidden_act": "relu"}, 2),
    "t5": ("T5ForConditionalGeneration", hf.T5Config, {**T5, "feed_forward_proj": "relu"}, 5),
    "t5-gated": ("T5ForConditionalGeneration", hf.T5Config, {**T5, "feed_forward_proj": "gated-relu"}, 5),
    "t5-encoder": ("T5EncoderModel", hf.T5Config, {**T5, "feed_forward_proj": "relu"}, 2),
    "mt5": ("MT5ForConditionalGeneration", hf.MT5Config, {**T5, "feed_forward_proj": "gated-relu"}, 5),
    "umt5": ("UMT5ForConditionalGeneration", hf.UMT5Config, {**T5, "feed_forward_proj": "gated-relu"}, 5),
    "bart": ("BartForConditionalGeneration", hf.BartConfig, BART, 5),
    "bart-decoder": ("BartForCausalLM", hf.BartConfig, BART, 3),
    "mbart": ("MBartForConditionalGeneration", hf.MBartConfig, BART, 5),
    "vit": ("ViTForImageClassification", hf.ViTConfig, {
        **HIDDEN, "image_size": 8, "patch_size": 4, "hidden_act": "relu"}, 2),
}  # fmt: skip


def make(case: str) -> nn.Module:
    """A tiny model with d_model 16, d_ff 64 and random weights, no bias of them zero, in evaluation mode."""
    name, config_class, settings, _ = CASES[case]
    torch.manual_seed(0)
    kind: Callable[..., nn.Module] = getattr(hf, name)
    model = kind(config_class(**settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or tuple(parameter.shape) in ((64, 16), (16, 64)):
                parameter.normal_(std=0.3)
    return model.eval()


def inputs(case: str, seed: int = 1) -> dict[str, Tensor]:
    """A batch of model inputs: 2 sequences of 12 tokens, or 2 images."""
    generator = torch.Generator().manual_seed(seed)
    if case == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, 61, (2, 12), generator=generator)
    batch = {"input_ids": ids, "attention_mask": (torch.arange(12) < torch.tensor([[12], [9]])).long()}
    if "ConditionalGeneration" in CASES[case][0]:
        batch["decoder_input_ids"] = torch.randint(3, 61, (2, 7), generator=generator)
    if case == "bart-decoder":  # transformers' cache counts the layers of the encoder, which is not there
        batch["use_cache"] = False  # type: ignore[assignment]
    return batch


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits, or the last hidden state of a model without a head."""
    out = model(**batch)
    return out.logits if "logits" in out else out.last_hidden_state
