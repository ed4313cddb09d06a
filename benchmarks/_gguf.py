"""A model of transformers as a GGUF file for llama.cpp: GPT-2, and Arcee (Llama with ReLU^2, no gate).

llama.cpp's own converter wants a tokenizer that it knows by a checksum. These files hold none: tokens go in and out.
Needs the package `gguf`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from torch import Tensor

NAMES = {
    "gpt2": {
        "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
        "lm_head": "output", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    },
    "arcee": {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    },
}  # fmt: skip
"""Type of model -> transformers' names of its parts, within a layer where there is no prefix, -> GGUF's."""
TRANSPOSED = ("c_attn", "c_proj", "c_fc")
"""`Conv1D` stores [in, out]."""


def write_gguf(model: Any, path: Path, kind: str = "F32") -> None:
    """Write a model's weights; matrices as `kind` ("F32", "BF16", "Q8_0", "Q4_0"), vectors and positions as F32."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(_d_ff(config))
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = NAMES[config.model_type]
    for name, tensor in model.state_dict().items():
        part, _, ending = name.rpartition(".")
        _, in_layer, rest = part.partition(".h." if config.model_type == "gpt2" else ".layers.")
        number, _, inside = rest.partition(".")
        known = names.get(inside if in_layer else part)
        if known is None or ending not in ("weight", "bias"):  # routers, and what transformers keeps besides
            continue
        values = _values(tensor, part, config)
        wide = values.ndim == 1 or known == "position_embd"
        quantised = gguf.GGMLQuantizationType["F32" if wide else kind]
        full = f"blk.{number}.{known}.{ending}" if in_layer else f"{known}.{ending}"
        writer.add_tensor(full, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _d_ff(config: Any) -> int:
    return (
        int(config.n_inner or 4 * config.n_embd) if config.model_type == "gpt2" else config.intermediate_size
    )


def _values(tensor: Tensor, part: str, config: Any) -> npt.NDArray[np.float32]:
    """Return what GGUF stores: rows are outputs, and Llama's rotated pairs stand side by side."""
    own = tensor.detach().float()
    if own.ndim == 2 and part.endswith(TRANSPOSED):
        own = own.t()
    if part.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if part.endswith("q_proj") else config.num_key_value_heads
        own = own.view(heads, 2, -1, own.shape[1]).transpose(1, 2).reshape(own.shape)
    return np.ascontiguousarray(own.numpy())
