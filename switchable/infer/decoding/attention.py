"""Attention over a cache whose memory is there from the start.

Shapes: B sequences, S new tokens of each, P places in the cache, H heads, G heads of keys and values, C numbers in a
head, N = H + 2G.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

from switchable.compute.cpu.decode.attend import SPARE, AttendCall
from switchable.compute.cpu.limits import why_no_loops
from switchable.compute.cpu.tasks import Scratch
from switchable.infer.decoding.families import BlockParts, Parts
from switchable.infer.decoding.matrices import Matrices, numbers


class Norm:
    """LayerNorm or RMSNorm, in float32.

    Args:
        module: with `weight`, and `bias` if it is a LayerNorm.
    """

    def __init__(self, module: nn.Module):
        self.weight, bias = numbers(module.weight), getattr(module, "bias", None)  # type: ignore[arg-type]
        self.bias = None if bias is None else numbers(bias)
        self.eps = float(getattr(module, "variance_epsilon", None) or module.eps)  # type: ignore[arg-type]
        self.is_rms = not isinstance(module, nn.LayerNorm)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of the last dimension, in x's dtype."""
        if self.is_rms:
            return rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Step(NamedTuple):
    """What all layers share of one step."""

    start: int
    """Tokens that are in the cache."""
    angles: tuple[Tensor, Tensor] | None
    """cos and signed sin, [B or 1, 1, S, rotated]."""
    mask_BSP: Tensor | None
    """What a token attends to, [B, 1, S, P]; None: everything up to itself."""


class Attention:
    """Attention of one layer.

    Args:
        block: the layer's modules.
        parts: of the model.
        name: of the layer.
        matrices: the weights.
    """

    def __init__(self, block: BlockParts, parts: Parts, name: str, matrices: Matrices):
        self.qkv = matrices.matrix(f"{name}.qkv", *block.qkv)
        self.out = matrices.matrix(f"{name}.out", block.out)
        self.heads, self.groups, self.size = parts.heads, parts.kv_heads, parts.head_dim
        self.by_head = parts.by_head
        self.head_norms = None if block.head_norms is None else tuple(map(Norm, block.head_norms))
        self.cache = torch.empty(0)
        self.attend: AttendCall | None = None

    def reserve(self, first_B: Tensor, places: int, dtype: torch.dtype, scratch: Scratch) -> None:
        """Get memory for keys and values, of which each sequence's begin somewhere."""
        sequences = len(first_B)
        self.cache = torch.empty(2, sequences, self.groups, places, self.size, dtype=dtype)
        if why_no_loops(self.size, torch.float32) is None:
            scores = scratch("scores", (sequences * self.groups, places + SPARE), torch.float32)
            self.attend = AttendCall(self.cache, self.heads, first_B, scores)

    def __call__(self, x_TD: Tensor, add_TD: Tensor, step: Step) -> Tensor:
        """Return add + attention(x); T = B·S."""
        keys, values = self.cache
        sequences = keys.shape[0]
        q_BHSC, k_BGSC, v_BGSC = self._split(self.qkv(x_TD), sequences)
        if step.angles is not None:
            q_BHSC, k_BGSC = (rotated(each, *step.angles) for each in (q_BHSC, k_BGSC))
        end = step.start + q_BHSC.shape[2]
        keys[:, :, step.start : end] = k_BGSC
        values[:, :, step.start : end] = v_BGSC
        if end - step.start == 1 and self.attend is not None:
            return self.out(self.attend(q_BHSC[:, :, 0].float(), end), add_TD)
        y_BHSC = scaled_dot_product_attention(
            q_BHSC.to(keys.dtype),
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=step.mask_BSP,
            is_causal=step.mask_BSP is None and q_BHSC.shape[2] > 1,
            enable_gqa=self.groups != self.heads,
        )
        return self.out(y_BHSC.transpose(1, 2).reshape(len(x_TD), -1).to(x_TD.dtype), add_TD)

    def _split(self, qkv: Tensor, sequences: int) -> tuple[Tensor, ...]:
        if self.by_head:
            each = qkv.view(sequences, -1, self.heads, 3, self.size).permute(3, 0, 2, 1, 4).unbind(0)
            return tuple(each)
        whole = qkv.view(sequences, -1, self.heads + 2 * self.groups, self.size).transpose(1, 2)
        q, k, v = torch.split(whole, [self.heads, self.groups, self.groups], dim=1)
        if self.head_norms is not None:
            q, k = (norm(x) for norm, x in zip(self.head_norms, (q, k), strict=True))
        return q, k, v


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first numbers of each head; `sin` has the sign of the half that it is multiplied with."""
    turned = cos.shape[-1]
    if turned < x.shape[-1]:
        own, rest = x[..., :turned], x[..., turned:]
        return torch.cat((rotated(own, cos, sin), rest), dim=-1)
    return torch.addcmul(x * cos, x.roll(turned // 2, -1), sin).to(x.dtype)


def angles_of(rotary: nn.Module, places: int) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin of all positions, [places, rotated], from a model's own module."""
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1), torch.arange(places).unsqueeze(0))
    sin = sin[0].clone()
    sin[:, : sin.shape[1] // 2] *= -1
    return cos[0], sin
