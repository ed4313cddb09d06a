"""What a decoder needs to know of a model: where its parts are, for the families that it decodes.

    x = tokens + positions;   x += out · attention(qkv · norm1(x));   x += FFN(norm2(x));   logits = head · norm(x)

    family                          positions   norm        qkv                     besides
    gpt2                            learned     LayerNorm   one, a part after another
    opt                             learned     LayerNorm   three
    gpt_neox                        rotary      LayerNorm   one, a head after another    parallel or not
    llama, mistral, qwen2, qwen3,   rotary      RMSNorm     three                   qwen3: norms of q and k
    arcee

Settings that change the formula beyond this are refused (`why_not`): then transformers' `generate` decodes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose angles don't depend on how long the text is."""


class BlockParts(NamedTuple):
    """A layer's modules."""

    norms: tuple[nn.Module, nn.Module]
    qkv: tuple[nn.Linear, ...]
    out: nn.Linear
    ffn: nn.Module
    """The FFN's own module, or the layer where it has none."""
    head_norms: tuple[nn.Module, nn.Module] | None = None
    """Of q and k."""


class Parts(NamedTuple):
    """A model's modules and sizes."""

    tokens: nn.Embedding
    positions: Tensor | None
    """Learned, [positions, D]."""
    rotary: nn.Module | None
    blocks: list[BlockParts]
    norm: nn.Module | None
    head: nn.Linear
    heads: int
    kv_heads: int
    head_dim: int
    by_head: bool = False
    """Whether q, k and v of a head stand side by side, head after head."""
    parallel: bool = False
    """Whether the FFN reads what attention reads."""


class Skeleton(nn.Module):
    """Modules that are a model's parts and no more, built by `skeleton.py`.

    Args:
        config: with `max_position_embeddings`.
        sizes: fields of `Parts` that are numbers.
    """

    tokens: nn.Embedding
    positions: Tensor | None
    rotary: nn.Module | None
    layers: nn.ModuleList
    norm: nn.Module | None
    head: nn.Linear

    def __init__(self, config: Any, sizes: Mapping[str, Any]):
        super().__init__()
        self.config, self.sizes = config, sizes

    @property
    def parts(self) -> Parts:
        """What a decoder takes."""
        blocks = []
        for b in cast(Any, self.layers):
            norms = None if b.q_norm is None else (b.q_norm, b.k_norm)
            blocks.append(BlockParts((b.norm0, b.norm1), (b.qkv,), b.out, b.ffn, norms))
        return Parts(self.tokens, self.positions, self.rotary, blocks, self.norm, self.head, **self.sizes)


def _gpt2(model: Any) -> Parts:
    config, inner = model.config, model.transformer
    blocks = [
        BlockParts((b.ln_1, b.ln_2), (b.attn.c_attn,), b.attn.c_proj, b.mlp) for b in cast(Any, inner.h)
    ]
    heads = config.n_head
    sizes = (heads, heads, config.n_embd // heads)
    return Parts(inner.wte, inner.wpe.weight, None, blocks, inner.ln_f, model.lm_head, *sizes)


def _opt(model: Any) -> Parts:
    config, inner = model.config, model.model.decoder
    blocks = [
        BlockParts(
            (b.self_attn_layer_norm, b.final_layer_norm),
            (b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj),
            b.self_attn.out_proj,
            b,
        )
        for b in inner.layers
    ]
    positions = inner.embed_positions
    heads = config.num_attention_heads
    sizes = (heads, heads, config.hidden_size // heads)
    return Parts(
        inner.embed_tokens,
        positions.weight[positions.offset :],
        None,
        blocks,
        inner.final_layer_norm,
        model.lm_head,
        *sizes,
    )


def _neox(model: Any) -> Parts:
    config, inner = model.config, model.gpt_neox
    blocks = [
        BlockParts(
            (b.input_layernorm, b.post_attention_layernorm),
            (b.attention.query_key_value,),
            b.attention.dense,
            b.mlp,
        )
        for b in inner.layers
    ]
    heads = config.num_attention_heads
    return Parts(
        inner.embed_in,
        None,
        inner.rotary_emb,
        blocks,
        inner.final_layer_norm,
        model.get_output_embeddings(),
        heads,
        heads,
        config.hidden_size // heads,
        by_head=True,
        parallel=config.use_parallel_residual,
    )


def _llama(model: Any) -> Parts:
    config, inner = model.config, model.model
    blocks = []
    for b in inner.layers:
        own = b.self_attn
        norms = (own.q_norm, own.k_norm) if hasattr(own, "q_norm") else None
        qkv = (own.q_proj, own.k_proj, own.v_proj)
        pair = (b.input_layernorm, b.post_attention_layernorm)
        blocks.append(BlockParts(pair, qkv, own.o_proj, b.mlp, norms))
    sizes = (config.num_attention_heads, config.num_key_value_heads, inner.layers[0].self_attn.head_dim)
    return Parts(inner.embed_tokens, None, inner.rotary_emb, blocks, inner.norm, model.lm_head, *sizes)


FAMILIES: dict[str, Callable[[Any], Parts]] = {
    "GPT2LMHeadModel": _gpt2,
    "OPTForCausalLM": _opt,
    "GPTNeoXForCausalLM": _neox,
    **dict.fromkeys(
        (
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "ArceeForCausalLM",
        ),
        _llama,
    ),
}
"""By the class of the model."""

ODD: tuple[tuple[str, Any, str], ...] = (
    ("scale_attn_weights", True, "attention is not scaled"),
    ("scale_attn_by_inverse_layer_idx", False, "attention is scaled by the layer's number"),
    ("do_layer_norm_before", True, "its norms come after"),
    ("add_cross_attention", False, "it has cross-attention"),
)
"""Settings, the value that we know how to decode, and what another one means."""


def why_no_family(model: nn.Module) -> str | None:
    """Return None, or why a model is none that we decode: words that follow "it"."""
    if isinstance(model, Skeleton):
        return None
    config, name = cast(Any, model.config), type(model).__name__
    if name not in FAMILIES:
        return f"is a {name}, none of {', '.join(FAMILIES)}"
    for setting, known, what in ODD:
        if getattr(config, setting, known) != known:
            return f"has {setting}={getattr(config, setting)}: {what}"
    if getattr(config, "word_embed_proj_dim", None) not in (None, config.hidden_size):
        return "projects its embeddings to another width"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ROTARY_TYPES:
        return f"has rotary positions of type {rope['rope_type']}, none of {', '.join(ROTARY_TYPES)}"
    window, positions = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", 0)
    if window is not None and getattr(config, "use_sliding_window", True) and window < positions:
        return f"attends to a sliding window of {window} of its {positions} positions"
    return None


def parts_of(model: nn.Module) -> Parts:
    """Return the parts of a model that `why_no_family` has nothing against."""
    return model.parts if isinstance(model, Skeleton) else FAMILIES[type(model).__name__](model)


def child(module: nn.Module, path: str) -> nn.Linear:
    """Return a part of a module by its path."""
    return cast(nn.Linear, operator.attrgetter(path)(module))
