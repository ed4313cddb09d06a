"""A tiny random model of any text model class of transformers, and inputs for it.

Configs differ in what they call things; most of it is said by a few dozen names. What is left is `EXCEPTIONS`.
"""

from __future__ import annotations

import inspect
import random
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

WIDTH, NEURONS, VOCABULARY, POSITIONS = 32, 104, 128, 64
"""d_model, d_ff, tokens known, and positions; no part but an FFN has 104 of anything."""
SEQUENCES, LENGTH = 4, 16
"""Together tokens enough for the compiled loops, which add in another order than dense mode."""
PARAMETERS = 20_000_000
"""At most: a model above that was not made tiny."""
MAPPINGS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "TEXT_ENCODING")
OTHER_SENSES = ("vision", "audio", "image", "acoustic", "semantic", "codec")
"""Words in the names of configs inside a config: the model takes pictures or sound besides text."""

SIZES: dict[int, str] = {
    2: """
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
        num_encoder_layers speech_encoder_layers encoder_num_hidden_layers decoder_num_hidden_layers
        num_key_value_heads num_kv_heads encoder_num_key_value_heads decoder_num_key_value_heads
        swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k top_k
        num_self_attends_per_block linear_num_key_heads mamba_n_groups n_groups mamba_ngroups num_mem_blocks
    """,
    4: """
        num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads
        decoder_attention_heads speech_encoder_attention_heads num_encoder_attention_heads
        num_decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads
        swa_num_attention_heads num_self_attention_heads num_cross_attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts linear_num_value_heads index_n_heads
        mamba_n_heads mamba_num_heads n_mamba_heads linear_num_heads
    """,
    8: """
        head_dim d_kv kv_channels d_head attention_head_size attention_head_dim dim_head v_head_dim
        qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim index_head_dim
        index_topk swa_head_dim global_head_dim mamba_d_state state_size ssm_state_size attention_window
        hidden_size_per_layer_input linear_head_dim rotary_dim swa_v_head_dim mamba_dt_rank time_step_rank
    """,
    16: """
        q_lora_rank kv_lora_rank qk_head_dim moe_intermediate_size shared_expert_intermediate_size
        moe_shared_expert_intermediate_size expert_ffn_hidden_size conv_channels mamba_d_head mamba_head_dim
        mamba_headdim mamba_chunk_size
    """,
    WIDTH: """
        hidden_size d_model n_embd emb_dim dim embedding_size embedding_dim input_embedding_size
        output_embedding_size word_embed_proj_dim attention_hidden_size entity_emb_size pooler_hidden_size
        encoder_hidden_size decoder_hidden_size true_hidden_size intra_bottleneck_size lru_width
        embedding_rank prediction_head_size d_latents
    """,
    NEURONS: """
        intermediate_size d_ff n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size
        speech_encoder_intermediate_size feed_forward_size dff dim_ff hidden_dim d_inner
        intermediate_size_mlp dense_intermediate_size
    """,
    VOCABULARY: """
        vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size unpadded_vocab_size
        vocab_size_per_layer_input entity_vocab_size char_vocab_size t2u_vocab_size
    """,
    POSITIONS: """
        max_position_embeddings n_positions n_ctx max_source_positions max_target_positions
        max_encoder_position_embeddings max_decoder_position_embeddings context_length max_seq_len
        model_max_length sliding_window local_attention query_pre_attn_scalar
    """,
    1: """
        n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts num_expert_group
    """,
}
ACTIVATIONS = """
    hidden_act hidden_activation activation_function activation dense_act_fn afn ff_activation mlp_hidden_act
    encoder_hidden_act speech_encoder_hidden_act decoder_hidden_act ffn_activation
"""
RELUS = ("relu", "relu2", "relu_squared")
HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 2 * WIDTH,
    "attention_head_dim": 16,
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "DiffLlamaConfig": {"attention_dropout": 0.0},
    "Dots3NoteConfig": {"num_key_value_heads": 4},
    "EsmConfig": {"pad_token_id": 1, "mask_token_id": 2},
    "EsmcConfig": {"num_key_value_heads": 4},
    "FalconH1Config": {"mamba_d_ssm": 64},
    "FunnelConfig": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {
        "num_kv_shared_layers": 0,
        "intermediate_size": NEURONS,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "IBertConfig": {"hidden_act": "gelu"},  # it refuses any other
    "Mamba2Config": {"head_dim": 16},
    "MoonshineConfig": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "MoonshineStreamingEncoderConfig": {"num_key_value_heads": 4, "sliding_windows": [[16, 4], [16, 0]]},
    "NeoMMEConfig": {"head_dim": 16},
    "PerceiverConfig": {
        "max_position_embeddings": LENGTH,
        "self_attention_widening_factor": 3,
        "cross_attention_widening_factor": 3,
    },
    "Qwen4ExpTextConfig": {"output_gate_type": "silu"},
    "RecurrentGemmaConfig": {"intermediate_size": 2 * NEURONS},  # of both projections together
    "ReformerConfig": {"axial_pos_embds": False, "is_decoder": True, "attn_layers": ["local", "lsh"]},
    "ReformerForMaskedLM": {"is_decoder": False},
    "RoCBertConfig": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "XmodConfig": {"languages": ("en_XX",), "default_language": "en_XX"},
    "ZambaConfig": HYBRID,
    "Zamba2Config": HYBRID | {"num_key_value_heads": 4},
    "ZayaConfig": {"num_experts_per_tok": 1},
}
"""What else a config is given, by the name of its class or the model's."""
FRAMES_FIRST = ("Speech2Text", "Seamless", "Canary", "CohereAsr")
"""Models of speech that take frames before numbers of a frame."""
NAMED = {name: value for value, names in SIZES.items() for name in names.split()}


class CannotBuildError(Exception):
    """No tiny model of a class; says why."""


def classes() -> dict[str, type]:
    """Every text model class that transformers' auto classes name, by its name."""
    found: dict[str, type] = {}
    for mapping in MAPPINGS:
        for names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            for name in (names,) if isinstance(names, str) else names:
                kind = getattr(transformers, name, None)
                if kind is not None and not _takes_more_than_text(kind):
                    found[name] = kind
    return dict(sorted(found.items()))


def _takes_more_than_text(kind: Any) -> bool:
    return any(word in name for name in _parts(kind.config_class) for word in OTHER_SENSES)


def _parts(config: Any) -> tuple[str, ...]:
    """Names of the configs inside a config."""
    return tuple(getattr(config, "sub_configs", None) or ())


def small_config(kind: Any, model: str = "") -> Any:
    """Return a config of a class with small sizes, a ReLU if one can be asked for, and dropout if there is any."""
    usual = kind()
    settings: dict[str, Any] = {}
    for name, value in usual.to_dict().items():
        if name in NAMED and (value is None or isinstance(value, int) or name == "attention_window"):
            settings[name] = NAMED[name]
        elif name in ACTIVATIONS.split() and isinstance(value, str) and value not in RELUS:
            settings[name] = "relu"
        elif name == "gelu_activation":
            settings[name] = False  # XLM's other choice is ReLU
        elif name == "feed_forward_proj":
            settings[name] = "gated-relu" if str(value).startswith("gated") else "relu"
        elif "layerdrop" in name or name == "layer_drop":
            settings[name] = 0.0
        elif ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            settings[name] = 0.1
        elif name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            settings[name] = 2
    if "kv_lora_rank" in settings:  # latent attention has no groups of heads
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= {
        name: small_config(type(part)) for name in _parts(kind) if (part := getattr(usual, name)) is not None
    }
    settings |= EXCEPTIONS.get(kind.__name__, {}) | EXCEPTIONS.get(model, {})
    return kind(**settings)


def build(kind: Any) -> nn.Module:
    """Return a tiny model of a class with random weights, in evaluation mode; always the same.

    Raises:
        CannotBuildError: it is not tiny.
    """
    seed(0)
    model: nn.Module = kind(small_config(kind.config_class, kind.__name__))
    size = sum(p.numel() for p in model.parameters())
    if size > PARAMETERS:
        raise CannotBuildError(f"{size:,} parameters: some size has a name that is not known here")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") and p.is_floating_point():
                p.normal_(std=0.1)
            elif p.ndim == 2 and NEURONS in p.shape:
                p.normal_(std=0.2)
    return model.eval()


def inputs(model: Any) -> dict[str, Any]:
    """Return a batch for a model: token ids, or sound where it wants that, and what it learns from it."""
    seed(1)
    known = set(inspect.signature(model.forward).parameters)
    codebooks = getattr(model.config, "num_codebooks", 1)
    ids = torch.randint(5, VOCABULARY, (SEQUENCES * codebooks, LENGTH))
    batch: dict[str, Any] = {}
    if model.main_input_name in ("input_ids", "inputs"):
        batch["input_ids"] = ids
        if "attention_mask" in known:
            batch["attention_mask"] = torch.ones_like(ids)
    else:
        batch[model.main_input_name] = _sound(model)
    if "decoder_input_ids" in known:
        batch["decoder_input_ids"] = ids.flip(1)
    if "labels" in known and codebooks == 1:
        batch["labels"] = ids
    if "use_cache" in known or "kwargs" in known:
        batch["use_cache"] = False
    return batch


def _sound(model: Any) -> Tensor:
    """Return what a model of speech takes: samples, or frames of 80 numbers or so, in one order or the other."""
    config, frames = model.config, 2 * POSITIONS
    if model.main_input_name == "input_values":
        return torch.randn(SEQUENCES, 4000)
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    bins = next((getattr(config, name) for name in names if hasattr(config, name)), 80)
    shape = (frames, bins) if type(model).__name__.startswith(FRAMES_FIRST) else (bins, frames)
    return torch.randn(SEQUENCES, *shape)


def seed(number: int) -> None:
    """Begin all random numbers anew: some models draw numbers of other libraries as they compute."""
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 - what they draw from
    random.seed(number)
