"""Models with random weights to pre-train from scratch: causal, masked, or sequence to sequence.

Sizes are given in one vocabulary for all families (`d_model`, `d_ff`, `num_layers`, `num_heads`, `max_positions`);
every dropout is 0, as is usual where the text is seen about once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from switchable.errors import InputError, nearest

Sizes = Mapping[str, int]
Tokens = Mapping[str, int]


def build_model(
    family: str, sizes: Sizes, activation: str, vocab_size: int, tokens: Tokens
) -> PreTrainedModel:
    """Return a model with random weights (drawn from torch's global generator), to pre-train from scratch.

    Args:
        family: model type, a key of `BUILDERS`: gpt2, opt, llama, arcee (causal), bert, roberta (masked), t5
            (sequence to sequence; `num_layers` on each side).
        sizes: `d_model`, `d_ff`, `num_layers`, `num_heads`, `max_positions`.
        activation: name in `ACT2FN` of the FFN's activation, for llama of its gate's.
        vocab_size: rows of the embedding.
        tokens: special tokens by the name that transformers' configs give them: `eos_token_id`, and `pad_token_id`
            where the family pads (bert, roberta, t5), `bos_token_id`, `decoder_start_token_id` if they differ.

    Raises:
        InputError: a family that cannot be built here, or that pads with the end of text.
    """
    if family not in BUILDERS:
        raise InputError(
            f"family={family!r} cannot be pre-trained from scratch; use one of {', '.join(BUILDERS)}"
            + nearest(family, BUILDERS)
        )
    if family in PADDING and tokens.get("pad_token_id") == tokens["eos_token_id"]:
        raise InputError(
            f"the tokenizer pads with its end of text (id {tokens['eos_token_id']}), so family={family} would never "
            "learn it; give the tokenizer a pad_token of its own"
        )
    return model_of(BUILDERS[family](sizes, activation, {"vocab_size": vocab_size, **tokens}))


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of transformers that a config names in `architectures`.

    Raises:
        InputError: it names none that there is.
    """
    name = (getattr(config, "architectures", None) or [None])[0]
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise InputError(
            f"config.json names the model class {name!r} (architectures), which transformers "
            f"{transformers.__version__} does not have"
        )
    return kind


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model that a config names in `architectures`, with random weights."""
    model = class_of(config)(config)
    name_the_loss(model)
    return model


def name_the_loss(model: PreTrainedModel) -> None:
    """Tell transformers which loss a language model has where it would guess it from the class's name and warn."""
    if type(model).__name__.endswith("LMHeadModel"):
        model.loss_type = "ForCausalLM"


def _gpt2(sizes: Sizes, activation: str, rest: Tokens) -> PreTrainedConfig:
    return GPT2Config(
        architectures=[GPT2LMHeadModel.__name__],
        n_positions=sizes["max_positions"],
        n_ctx=sizes["max_positions"],  # transformers' name of old, by which other tools know it
        n_embd=sizes["d_model"],
        n_inner=sizes["d_ff"],
        n_layer=sizes["num_layers"],
        n_head=sizes["num_heads"],
        activation_function=activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_causal(rest),
    )


def _opt(sizes: Sizes, activation: str, rest: Tokens) -> PreTrainedConfig:
    return OPTConfig(
        architectures=[OPTForCausalLM.__name__],
        max_position_embeddings=sizes["max_positions"],
        hidden_size=sizes["d_model"],
        word_embed_proj_dim=sizes["d_model"],
        ffn_dim=sizes["d_ff"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        activation_function=activation,
        dropout=0.0,
        **_causal(rest),
    )


def _llama(sizes: Sizes, activation: str, rest: Tokens) -> PreTrainedConfig:
    return LlamaConfig(architectures=[LlamaForCausalLM.__name__], **_llama_settings(sizes, activation, rest))


def _arcee(sizes: Sizes, activation: str, rest: Tokens) -> PreTrainedConfig:
    """Llama without a gate, of which other engines compute ReLU^2."""
    settings = _llama_settings(sizes, activation, rest)
    return ArceeConfig(
        architectures=[ArceeForCausalLM.__name__],
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},  # not Arcee's own, stretched one
        **settings,
    )


def _llama_settings(sizes: Sizes, activation: str, rest: Tokens) -> dict[str, Any]:
    return dict(
        max_position_embeddings=sizes["max_positions"],
        hidden_size=sizes["d_model"],
        intermediate_size=sizes["d_ff"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        hidden_act=activation,
        **_causal(rest),
    )


def _causal(rest: Tokens) -> dict[str, Any]:
    """Return the vocabulary and special tokens of a causal model.

    It has no padding token where that is a token of the text too: transformers leaves its embedding zero for ever.
    """
    tokens = {"bos_token_id": rest["eos_token_id"], "pad_token_id": None, **rest}
    if tokens["pad_token_id"] in (tokens["bos_token_id"], tokens["eos_token_id"]):
        tokens["pad_token_id"] = None
    return tokens


def _bert(sizes: Sizes, activation: str, rest: Tokens) -> PreTrainedConfig:
    return BertConfig(
        architectures=[BertForMaskedLM.__name__],
        max_position_embeddings=sizes["max_positions"],
        **_bert_settings(sizes, activation, rest),
    )


def _roberta(sizes: Sizes, activation: str, rest: Tokens) -> PreTrainedConfig:
    return RobertaConfig(
        architectures=[RobertaForMaskedLM.__name__],
        # Its positions begin behind the padding token's number.
        max_position_embeddings=sizes["max_positions"] + rest["pad_token_id"] + 1,
        type_vocab_size=1,
        **_bert_settings(sizes, activation, rest),
    )


def _bert_settings(sizes: Sizes, activation: str, rest: Tokens) -> dict[str, Any]:
    return {
        "hidden_size": sizes["d_model"],
        "intermediate_size": sizes["d_ff"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"],
        "hidden_act": activation,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **rest,
    }


def _t5(sizes: Sizes, activation: str, rest: Tokens) -> PreTrainedConfig:
    return T5Config(
        architectures=[T5ForConditionalGeneration.__name__],
        n_positions=sizes["max_positions"],
        n_ctx=sizes["max_positions"],  # transformers' name of old, by which other tools know it
        d_model=sizes["d_model"],
        d_ff=sizes["d_ff"],
        d_kv=sizes["d_model"] // sizes["num_heads"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        feed_forward_proj=activation,
        dropout_rate=0.0,
        **{"decoder_start_token_id": rest["pad_token_id"], **rest},
    )


BUILDERS: dict[str, Callable[[Sizes, str, Tokens], PreTrainedConfig]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "llama": _llama,
    "arcee": _arcee,
    "bert": _bert,
    "roberta": _roberta,
    "t5": _t5,
}
"""Families that can be pre-trained from scratch."""
PADDING = ("bert", "roberta", "t5")
"""Those that need a padding token."""
