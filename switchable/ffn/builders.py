"""Models with random weights to pre-train from scratch: causal, masked, or sequence to sequence.

Sizes are given in one vocabulary for all families (`d_model`, `d_ff`, `num_layers`, `num_heads`, `max_positions`);
every dropout is 0, as is usual where the text is seen about once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import transformers
from transformers import (
    ArceeForCausalLM,
    BertForMaskedLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaForMaskedLM,
    T5ForConditionalGeneration,
)

from switchable.errors import InputError, nearest

Ints = Mapping[str, int]


class Builder(NamedTuple):
    """A family that can be pre-trained from scratch."""

    kind: type[PreTrainedModel]
    names: Mapping[str, str]
    """Setting of transformers' config -> what of `build_model`'s sizes and tokens it is."""
    fixed: Mapping[str, Any]
    """Settings that are always the same."""
    pads: bool = False
    """Whether it needs a padding token."""


USUAL = {
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_positions",
    "hidden_act": "activation",
}
GPT2 = {
    "n_embd": "d_model",
    "n_inner": "d_ff",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_positions": "max_positions",
    "n_ctx": "max_positions",  # transformers' name of old, by which other tools know it
    "activation_function": "activation",
}
OPT = {name: ours for name, ours in USUAL.items() if name not in ("intermediate_size", "hidden_act")} | {
    "ffn_dim": "d_ff",
    "word_embed_proj_dim": "d_model",
    "activation_function": "activation",
}
T5 = {
    **{name: name for name in ("d_model", "d_ff", "d_kv", "num_layers", "num_heads")},
    "n_positions": "max_positions",
    "n_ctx": "max_positions",
    "feed_forward_proj": "activation",
    "decoder_start_token_id": "pad_token_id",
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NOT_STRETCHED = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}  # as Arcee's own are

BUILDERS = {
    "gpt2": Builder(GPT2LMHeadModel, GPT2, dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)),
    "opt": Builder(OPTForCausalLM, OPT, {"dropout": 0.0}),
    "llama": Builder(LlamaForCausalLM, USUAL, {}),
    # Llama without a gate, of which other engines compute ReLU^2.
    "arcee": Builder(ArceeForCausalLM, USUAL, NOT_STRETCHED),
    "bert": Builder(BertForMaskedLM, USUAL, NO_DROPOUT, pads=True),
    "roberta": Builder(
        RobertaForMaskedLM,
        USUAL | {"max_position_embeddings": "positions_behind_padding"},
        NO_DROPOUT | {"type_vocab_size": 1},
        pads=True,
    ),
    "t5": Builder(T5ForConditionalGeneration, T5, {"dropout_rate": 0.0}, pads=True),
}
"""By model type of transformers."""


def build_model(family: str, sizes: Ints, activation: str, vocab_size: int, tokens: Ints) -> PreTrainedModel:
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
    kind, names, fixed, pads = BUILDERS[family]
    if pads and tokens.get("pad_token_id") == tokens["eos_token_id"]:
        raise InputError(
            f"the tokenizer pads with its end of text (id {tokens['eos_token_id']}), so family={family} would never "
            "learn it; give the tokenizer a pad_token of its own"
        )
    values: dict[str, Any] = {**sizes, **tokens, "activation": activation}
    values["d_kv"] = sizes["d_model"] // sizes["num_heads"]
    if "pad_token_id" in tokens:  # RoBERTa's positions begin behind that number
        values["positions_behind_padding"] = sizes["max_positions"] + tokens["pad_token_id"] + 1
    settings = {**fixed, **{name: values[ours] for name, ours in names.items()}}
    settings |= tokens if pads else _causal(tokens)
    return model_of(kind.config_class(architectures=[kind.__name__], vocab_size=vocab_size, **settings))


def _causal(rest: Ints) -> dict[str, Any]:
    """Return the vocabulary and special tokens of a causal model.

    It has no padding token where that is a token of the text too: transformers leaves its embedding zero for ever.
    """
    tokens = {"bos_token_id": rest["eos_token_id"], "pad_token_id": None, **rest}
    if tokens["pad_token_id"] in (tokens["bos_token_id"], tokens["eos_token_id"]):
        tokens["pad_token_id"] = None
    return tokens


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of transformers that a config names in `architectures`; raise InputError if there is none."""
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
