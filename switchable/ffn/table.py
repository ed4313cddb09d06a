"""The usual models of transformers, one row per family: the only place that knows any by name.

A model without a row is found by its structure (`finder.py`), which takes a few passes of it; a row takes none.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from switchable.ffn.families import Family

_GPT2 = Family("GPT2MLP", "c_fc", "c_proj", dropout="dropout", activation_setting="activation_function")
_OPT = Family(
    "OPTDecoderLayer", "fc1", "fc2", "activation_fn", in_layer=True, activation_setting="activation_function"
)
_NEOX = Family("GPTNeoXMLP", "dense_h_to_4h", "dense_4h_to_h")
_FC = Family("PhiMLP", "fc1", "fc2", "activation_fn")
_NEMOTRON = Family("NemotronMLP", "up_proj", "down_proj", "act_fn")
_LLAMA = Family("LlamaMLP", "up_proj", "down_proj", "act_fn", gate="gate_proj")
_BERT = Family(
    "BertLayer", "intermediate.dense", "output.dense", "intermediate.intermediate_act_fn", in_layer=True
)
_T5 = Family(
    "T5DenseActDense",
    "wi",
    "wo",
    hidden_dropout="dropout",
    layers="num_layers",
    decoder_layers="num_decoder_layers",
    activation_setting="feed_forward_proj",
)
_BART = replace(
    _OPT,
    ffn=("BartEncoderLayer", "BartDecoderLayer"),
    hidden_dropout="activation_dropout",
    layers="encoder_layers",
    decoder_layers="decoder_layers",
)


def _gated_too(row: Family, ffn: str) -> tuple[Family, Family]:
    """Return a T5-type row and its gated form, whose class is called differently."""
    return replace(row, ffn=f"{ffn}DenseActDense"), replace(
        row, ffn=f"{ffn}DenseGatedActDense", gate="wi_0", up="wi_1"
    )


FAMILIES: dict[str, Family | tuple[Family, ...]] = {
    "gpt2": _GPT2,
    "opt": _OPT,
    "gpt_neox": _NEOX,
    "phi": _FC,
    "nemotron": _NEMOTRON,
    "arcee": replace(_NEMOTRON, ffn="ArceeMLP"),
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, ffn="MistralMLP"),
    "qwen2": replace(_LLAMA, ffn="Qwen2MLP"),
    "qwen3": replace(_LLAMA, ffn="Qwen3MLP"),
    "gemma": replace(_LLAMA, ffn="GemmaMLP"),
    "gemma2": replace(_LLAMA, ffn="Gemma2MLP", activation_setting="hidden_activation"),
    "gemma3_text": replace(_LLAMA, ffn="Gemma3MLP", activation_setting="hidden_activation"),
    "olmo2": replace(_LLAMA, ffn="Olmo2MLP"),
    "granite": replace(_LLAMA, ffn="GraniteMLP"),
    "smollm3": replace(_LLAMA, ffn="SmolLM3MLP"),
    "bert": _BERT,
    "roberta": replace(_BERT, ffn="RobertaLayer"),
    "xlm-roberta": replace(_BERT, ffn="XLMRobertaLayer"),
    "electra": replace(_BERT, ffn="ElectraLayer"),
    "t5": _gated_too(_T5, "T5"),
    "mt5": _gated_too(_T5, "MT5"),
    "umt5": _gated_too(_T5, "UMT5"),
    "bart": _BART,
    "mbart": replace(_BART, ffn=("MBartEncoderLayer", "MBartDecoderLayer")),
    "vit": replace(_FC, ffn="ViTMLP"),
}
"""By the `model_type` of transformers' configs; more than one row where a setting decides the FFN's class."""


def row_of(model: nn.Module) -> Family | None:
    """Return the table's row for a transformers model, or None if its type has none."""
    rows = FAMILIES.get(str(getattr(getattr(model, "config", None), "model_type", None)))
    if rows is None or isinstance(rows, Family):
        return rows
    present = {type(module).__name__ for module in model.modules()}
    return next((row for row in rows if present & set(row.classes)), rows[0])
