"""Attention over a cache whose memory is there from the start.

Shapes: B sequences, S new tokens of each, P places in the cache, H heads, G heads of keys and values, C numbers in a
head, N = H + 2G.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from switchable.compute.cpu.decode.attend import SPARE, AttendCall
from switchable.compute.cpu.decode.norm import Norm
from switchable.compute.cpu.limits import why_no_loops
from switchable.compute.cpu.tasks import Scratch
from switchable.infer.decoding.families import BlockParts, Parts
from switchable.infer.decoding.matrices import Matrices, numbers


def norm_of(module: nn.Module) -> Norm:
    """Return a norm's numbers: `weight`, and `bias` if it is a LayerNorm that has one."""
    bias = getattr(module, "bias", None)
    weight_D = numbers(module.weight)  # type: ignore[arg-type]
    return Norm(weight_D, None if bias is None else numbers(bias), eps_of(module), is_rms=is_rms(module))


def eps_of(norm: nn.Module) -> float:
    """Return what a norm adds to the variance."""
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)  # type: ignore[arg-type]


def is_rms(norm: nn.Module) -> bool:
    """Whether a norm leaves the mean where it is."""
    return not isinstance(norm, nn.LayerNorm)


MOST_PLAIN = 768
"""Places up to which plain products are faster in bfloat16 than torch's fused attention: 1.5 to 20 times, measured with
64 a head and 1 to 8 sequences. In float32 they are not."""


class Step(NamedTuple):
    """What all layers share of one step."""

    start: int
    """Tokens that are in the cache."""
    angles: tuple[Tensor, Tensor] | None
    """cos and signed sin, [B or 1, 1, S, rotated]."""
    mask_BSP: Tensor | None
    """What a token attends to, [B or 1, 1, S, P]; None: everything up to itself."""
    bias_BSP: Tensor | None = None
    """The same as what is added to scores, for attention by plain products."""


class Attention:
    """Attention of one layer.

    Args:
        block: the layer's modules.
        parts: of the model.
        name: of the layer.
        matrices: the weights.
    """

    def __init__(self, block: BlockParts, parts: Parts, name: str, matrices: Matrices):
        self.qkv = matrices.matrix(f"{name}.qkv", *block.qkv, norm=norm_of(block.norms[0]))
        self.out = matrices.matrix(f"{name}.out", block.out)
        self.heads, self.groups, self.size = parts.heads, parts.kv_heads, parts.head_dim
        self.by_head = parts.by_head
        self.head_norms = tuple(map(norm_of, block.head_norms))
        self.joins = not parts.by_head and not self.head_norms
        """Whether one call turns queries and keys, keeps keys and values, and attends."""
        self.cache = torch.empty(0)
        self.attend: AttendCall | None = None

    def reserve(
        self, first_B: Tensor, places: int, dtype: torch.dtype, scratch: Scratch, turned: int
    ) -> None:
        """Get memory for keys and values, of which each sequence's begin somewhere; of a head `turned` numbers turn."""
        sequences = len(first_B)
        self.cache = torch.empty(2, sequences, self.groups, places, self.size, dtype=dtype, device="cpu")
        if why_no_loops(self.size, torch.float32) is None:
            scores = scratch("scores", (sequences * self.groups, places + SPARE), torch.float32)
            self.joins = self.joins and why_no_loops(turned // 2, torch.float32) is None
            self.attend = AttendCall(self.cache, self.heads, first_B, scores, turned if self.joins else None)

    def __call__(self, x_TD: Tensor, add_TD: Tensor, step: Step) -> Tensor:
        """Return add + attention(norm(x)); T = B·S."""
        sequences, qkv = self.cache.shape[1], self.qkv(x_TD)
        if self.joins and self.attend is not None and x_TD.shape[0] == sequences:
            qkv_BNC = qkv.float().view(sequences, -1, self.size)
            return self.out(self.attend(qkv_BNC, step.start + 1, step.angles), add_TD)
        keys, values = self.cache
        q_BHSC, k_BGSC, v_BGSC = self._split(qkv, sequences)
        if step.angles is not None:
            q_BHSC, k_BGSC = (rotated(each, *step.angles) for each in (q_BHSC, k_BGSC))
        end = step.start + q_BHSC.shape[2]
        keys[:, :, step.start : end] = k_BGSC
        values[:, :, step.start : end] = v_BGSC
        if end - step.start == 1 and self.attend is not None:
            return self.out(self.attend(q_BHSC[:, :, 0].float(), end), add_TD)
        q_BHSC, keys, values = q_BHSC.to(keys.dtype), keys[:, :, :end], values[:, :, :end]
        if step.bias_BSP is not None:
            y_BHSC = _plain(q_BHSC, keys, values, step.bias_BSP)
        else:
            y_BHSC = scaled_dot_product_attention(
                q_BHSC,
                keys,
                values,
                attn_mask=step.mask_BSP,
                is_causal=step.mask_BSP is None and q_BHSC.shape[2] > 1,
                enable_gqa=self.groups != self.heads,
            )
        return self.out(y_BHSC.transpose(1, 2).reshape(len(x_TD), -1).to(x_TD.dtype), add_TD)

    def _split(self, qkv: Tensor, sequences: int) -> tuple[Tensor, ...]:
        if self.by_head:
            return tuple(qkv.view(sequences, -1, self.heads, 3, self.size).permute(3, 0, 2, 1, 4).unbind(0))
        whole = qkv.view(sequences, -1, self.heads + 2 * self.groups, self.size).transpose(1, 2)
        q, k, v = torch.split(whole, [self.heads, self.groups, self.groups], dim=1)
        if self.head_norms:
            q, k = (norm(x) for norm, x in zip(self.head_norms, (q, k), strict=True))
        return q, k, v


def _plain(q_BHSC: Tensor, k_BGPC: Tensor, v_BGPC: Tensor, bias_BSP: Tensor) -> Tensor:
    sequences, _, length, size = q_BHSC.shape
    grouped = q_BHSC.reshape(sequences, k_BGPC.shape[1], -1, length, size) * size**-0.5
    scores = torch.matmul(grouped, k_BGPC.unsqueeze(2).transpose(3, 4)).add_(bias_BSP.unsqueeze(2))
    return torch.matmul(scores.softmax(-1), v_BGPC.unsqueeze(2)).flatten(1, 2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first numbers of each head; `sin` has the sign of the half that it is multiplied with."""
    if (turned := cos.shape[-1]) < x.shape[-1]:
        own, rest = x[..., :turned], x[..., turned:]
        return torch.cat((rotated(own, cos, sin), rest), dim=-1)
    return torch.addcmul(x * cos, x.roll(turned // 2, -1), sin).to(x.dtype)


def angles_of(rotary: Any, places: int) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin of all positions, [places, rotated], from the frequencies of a model's own module."""
    half = torch.arange(places).float().unsqueeze(1) * rotary.inv_freq.detach().float()
    cos, sin = (each * rotary.attention_scaling for each in (half.cos(), half.sin()))
    return torch.hstack([cos, cos]), torch.hstack([-sin, sin])
