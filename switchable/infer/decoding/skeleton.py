"""A model as a decoder sees it, from plain values and the shapes of tensors: modules without memory.

None of transformers' classes is built or imported for it, which would take more memory than a small model in 8 bits.

    facts_and_tensors     what a file must hold of a model besides its matrices
    skeleton              the modules, again; their parameters have the tensors' names
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from switchable.ffn.convert import layers_of
from switchable.ffn.description import describe, take_over
from switchable.ffn.families import Family
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.ssd import FFNSettings
from switchable.infer.decoding.attention import eps_of, is_rms
from switchable.infer.decoding.families import Parts, Skeleton, parts_of
from switchable.infer.decoding.matrices import numbers
from switchable.infer.loss import positions_of
from switchable.settings import SwitchConfig, settled

Shapes = Mapping[str, tuple[int, ...]]
SIZES = ("heads", "kv_heads", "head_dim", "by_head", "parallel")


def facts_and_tensors(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what is known of a switchable model besides its matrices.

    That is plain values, and tensors in float32 by their names in the skeleton.
    """
    parts, layers = parts_of(model), layers_of(model)
    norms, described = _norms(parts), [describe(layer.ssd) for layer in layers]
    facts = {
        **{name: getattr(parts, name) for name in SIZES},
        "most_positions": positions_of(model),
        "rotary_scaling": float(getattr(parts.rotary, "attention_scaling", 1.0)),
        "tied": parts.tokens.weight is parts.head.weight,
        "rms": is_rms(parts.blocks[0].norms[0]),
        "eps": {name: eps_of(norm) for name, norm in norms.items()},
        "activation": layers[0].ssd.settings.activation,
        # Which neuron is which is long, and nothing that decodes asks.
        "ffns": [{name: d[name] for name in d if name != "neuron_ids"} for d in described],
    }
    found: dict[str, Tensor | None] = {"positions": parts.positions, "head.bias": parts.head.bias}
    if parts.rotary is not None:
        found["rotary.inv_freq"] = cast(Tensor, parts.rotary.inv_freq)
    for name, norm in norms.items():
        found |= {f"{name}.{leaf}": getattr(norm, leaf, None) for leaf in ("weight", "bias")}
    for number, (block, layer) in enumerate(zip(parts.blocks, layers, strict=True)):
        ssd, at = layer.ssd, f"layers.{number}"
        biases: list[Tensor] = [each.bias for each in block.qkv if each.bias is not None]
        found[f"{at}.qkv.bias"] = torch.cat(biases) if biases else None
        own = {"out": block.out, "ffn.up": ssd.up_projection, "ffn.down": ssd.down_projection}
        own |= {} if ssd.gate_projection is None else {"ffn.gate": ssd.gate_projection}
        found |= {f"{at}.{name}.bias": projection.bias for name, projection in own.items()}
        found |= {f"{at}.ffn.router.{n}": p for n, p in layer.router.named_parameters()}
    return facts, {name: numbers(tensor) for name, tensor in found.items() if tensor is not None}


def skeleton(facts: Mapping[str, Any], shapes: Shapes) -> Skeleton:
    """Return the modules of a model, without memory.

    Args:
        facts: of `facts_and_tensors`.
        shapes: of its tensors, and of the matrices by a decoder's names, all neurons being rows.

    Raises:
        KeyError, TypeError, ValueError: they are not those of one model.
    """
    model = Skeleton(
        SimpleNamespace(max_position_embeddings=facts["most_positions"]),
        {name: facts[name] for name in SIZES},
    )
    rows, d_model = shapes["head" if facts["tied"] else "tokens"]
    model.head, model.norm = _linear("head", shapes), _norm("norm", facts, shapes)
    model.tokens = nn.Embedding(1, 1)
    model.tokens.num_embeddings = rows
    model.tokens.weight = model.head.weight if facts["tied"] else _nothing(rows, d_model)
    model.positions = _nothing(*shapes["positions"]) if "positions" in shapes else None
    model.rotary = _rotary(facts, shapes) if "rotary.inv_freq" in shapes else None
    model.layers = nn.ModuleList(_layer(n, facts, shapes) for n in range(len(facts["ffns"])))
    return model.eval()


def _nothing(*shape: int) -> nn.Parameter:
    """Return a parameter of one number, repeated. On the device "meta" torch would load 0.1 GB for it."""
    return nn.Parameter(torch.zeros((), dtype=torch.float32).expand(shape), requires_grad=False)


def _layer(number: int, facts: Mapping[str, Any], shapes: Shapes) -> nn.Module:
    layer: Any = nn.Module()
    for norm in ("norm0", "norm1", "q_norm", "k_norm"):
        setattr(layer, norm, _norm(f"layers.{number}.{norm}", facts, shapes))
    layer.qkv, layer.out = (_linear(f"layers.{number}.{each}", shapes) for each in ("qkv", "out"))
    layer.ffn = _ffn(f"layers.{number}.ffn", facts["activation"], facts["ffns"][number], shapes)
    return cast(nn.Module, layer)


def _ffn(name: str, activation: str, described: Mapping[str, Any], shapes: Shapes) -> SwitchableFFN:
    (d_ff, d_model), ffn = shapes[f"{name}.up"], nn.Module()
    ffn.up = _linear(f"{name}.up", shapes)
    gate = "gate" if f"{name}.gate" in shapes else None
    if gate is not None:
        ffn.gate = _linear(f"{name}.gate", shapes)
    ffn.down = _projection(d_model, d_ff, bias=f"{name}.down.bias" in shapes)
    family = Family("FFN", "up", "down", None, gate, activation_fn=activation)
    config = SwitchConfig(num_experts=described["num_experts"], experts_per_token=1)
    settings = FFNSettings(
        family, described["name"], activation, d_model, d_ff, settled(config, d_ff, activation)
    )
    layer = SwitchableFFN(ffn, settings)
    take_over(layer.ssd, described)
    return layer


def _linear(name: str, shapes: Shapes) -> nn.Linear:
    rows, width = shapes[name]
    return _projection(rows, width, bias=f"{name}.bias" in shapes)


def _projection(rows: int, width: int, bias: bool) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False)
    linear.out_features, linear.in_features, linear.weight = rows, width, _nothing(rows, width)
    linear.register_parameter("bias", _nothing(rows) if bias else None)
    return linear


def _norm(name: str, facts: Mapping[str, Any], shapes: Shapes) -> nn.Module | None:
    if name not in facts["eps"]:
        return None
    kind = nn.RMSNorm if facts["rms"] else nn.LayerNorm
    return kind(shapes[f"{name}.weight"], facts["eps"][name])


def _rotary(facts: Mapping[str, Any], shapes: Shapes) -> nn.Module:
    rotary: Any = nn.Module()
    rotary.inv_freq, rotary.attention_scaling = _nothing(*shapes["rotary.inv_freq"]), facts["rotary_scaling"]
    return cast(nn.Module, rotary)


def _norms(parts: Parts) -> dict[str, nn.Module]:
    found = {} if parts.norm is None else {"norm": parts.norm}
    for number, block in enumerate(parts.blocks):
        names = ("norm0", "norm1", "q_norm", "k_norm")
        each = zip(names, (*block.norms, *block.head_norms), strict=False)
        found |= {f"layers.{number}.{name}": norm for name, norm in each}
    return found
