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

from collections.abc import Mapping
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
    head_norms: tuple[nn.Module, ...] = ()
    """Of q and k, if there are any."""


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
            norms = () if b.q_norm is None else (b.q_norm, b.k_norm)
            blocks.append(BlockParts((b.norm0, b.norm1), (b.qkv,), b.out, b.ffn, norms))
        return Parts(self.tokens, self.positions, self.rotary, blocks, self.norm, self.head, **self.sizes)


class Names(NamedTuple):
    """What a family calls its modules: the inner model, its parts, and, up to `head_norms`, those of a layer."""

    inner: str
    norms: tuple[str, str]
    qkv: tuple[str, ...]
    out: str
    ffn: str = "mlp"
    head_norms: tuple[str, ...] = ()
    blocks: str = "layers"
    norm: str = "norm"
    positions: str | None = None
    by_head: bool = False


_SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_AROUND = ("input_layernorm", "post_attention_layernorm")
_LLAMA = Names("model", _AROUND, _SEPARATE, "self_attn.o_proj")
FAMILIES = {
    "GPT2LMHeadModel": Names(
        "transformer",
        ("ln_1", "ln_2"),
        ("attn.c_attn",),
        "attn.c_proj",
        blocks="h",
        norm="ln_f",
        positions="wpe",
    ),
    "OPTForCausalLM": Names(
        "model.decoder",
        ("self_attn_layer_norm", "final_layer_norm"),
        _SEPARATE,
        "self_attn.out_proj",
        ffn="",
        norm="final_layer_norm",
        positions="embed_positions",
    ),
    "GPTNeoXForCausalLM": Names(
        "gpt_neox",
        _AROUND,
        ("attention.query_key_value",),
        "attention.dense",
        norm="final_layer_norm",
        by_head=True,
    ),
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA._replace(head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "ArceeForCausalLM": _LLAMA,
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
    if isinstance(model, Skeleton):
        return model.parts
    names, whole = FAMILIES[type(model).__name__], cast(Any, model)
    config, inner = whole.config, whole.get_submodule(names.inner)
    positions = None
    if names.positions is not None:
        learned = getattr(inner, names.positions)  # of OPT's the first rows belong to no position
        positions = learned.weight[learned.offset :] if hasattr(learned, "offset") else learned.weight
    heads = config.num_attention_heads
    return Parts(
        tokens=whole.get_input_embeddings(),
        positions=positions,
        rotary=getattr(inner, "rotary_emb", None),
        blocks=[_block(layer, names) for layer in getattr(inner, names.blocks)],
        norm=getattr(inner, names.norm),
        head=whole.get_output_embeddings(),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", heads),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        by_head=names.by_head,
        parallel=getattr(config, "use_parallel_residual", False),
    )


def _block(layer: nn.Module, names: Names) -> BlockParts:
    def at(paths: tuple[str, ...]) -> Any:
        return tuple(map(layer.get_submodule, paths))

    out, ffn = at((names.out, names.ffn))
    return BlockParts(at(names.norms), at(names.qkv), out, ffn, at(names.head_norms))
