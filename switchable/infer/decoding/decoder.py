"""A causal model for decoding: a handful of calls per layer, and memory for the cache from the start.

    Decoder(model, "int8")     takes the model's weights over, in a width
    .begin(ids, pads, places)  reads prompts                                    -> logits of the last token
    .next(ids)                 one token more of each sequence                  -> logits

The FFNs multiply in the mode that the model is in: `set_mode` is the switch here too. Families are those of
`families.py`; `why_not` says what keeps a model out, and transformers' `generate` decodes it.

Shapes: B sequences, S tokens of a prompt, T = B·S, P places in the cache, D d_model, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchable.compute.cpu.limits import why_no_loops, why_not_in_memory
from switchable.errors import InputError
from switchable.ffn.families import d_in
from switchable.infer.decoding.attention import MOST_PLAIN, Attention, Step, angles_of, norm_of
from switchable.infer.decoding.chain import TokenChain, chainable
from switchable.infer.decoding.families import Parts, parts_of, why_no_family
from switchable.infer.decoding.ffn import FFN, ByNeuron, FFNParts, ffn, ffns_of
from switchable.infer.decoding.matrices import WIDTHS, Matrices, Matrix, Stored, numbers
from switchable.infer.decoding.rounded import round_weights
from switchable.infer.loss import positions_of


class Block(NamedTuple):
    """One layer."""

    attention: Attention
    ffn: FFN


def why_not(model: nn.Module, mode: str = "dense") -> str | None:
    """Return None, or why a model is not decoded here: words that follow "it"."""
    if {parameter.device.type for parameter in model.parameters()} - {"cpu", "meta"}:
        return "is not on the CPU"
    if why_not_in_memory(*(each for each in model.parameters() if each.device.type == "cpu")):
        return "has weights that are no plain tensors"
    if (reason := why_no_family(model)) is not None:
        return reason
    if (found := ffns_of(model, parts_of(model))) is None:
        return "has FFNs that its family does not have"
    for each in found:
        if mode == "sparse" and not each.is_compiled:
            return f"has no compiled code for experts with {each.activation} and a width of {each.d_model}"
    return None


class Decoder:
    """A model for decoding, of which `why_not` says None.

    Args:
        model: a causal language model; its weights are taken over. Afterwards it is in the width given; in 8 bits it
            has no matrices any more.
        weights: a key of `WIDTHS`.
        stored: matrices in 8 bits from a file; then the model's own are not looked at.

    Raises:
        InputError: a width that is not known.
    """

    def __init__(self, model: Any, weights: str = "float32", stored: Stored | None = None):
        if weights not in WIDTHS:
            raise InputError(f"weights={weights!r} is not known; use one of {', '.join(WIDTHS)}")
        if weights != "int8":
            round_weights(model, weights)
        parts = parts_of(model)
        found = ffns_of(model, parts) or []
        if weights == "int8":
            _check_widths(parts, found)
        self.model, self.matrices = model.eval(), Matrices(weights, stored)
        self.parallel, self.positions = parts.parallel, positions_of(model)
        tied = parts.tokens.weight is parts.head.weight
        self.tokens = None if tied else self.matrices.rows("tokens", [(parts.tokens.weight, False)])
        norm = None if parts.norm is None else norm_of(parts.norm)
        self.head: Matrix = self.matrices.matrix("head", parts.head, norm=norm)
        self.places = None if parts.positions is None else numbers(parts.positions)
        self.rotary = parts.rotary
        if parts.rotary is not None and any(each.is_meta for each in parts.rotary.buffers()):
            self.rotary = type(parts.rotary)(model.config)  # it was built without memory
        self.blocks = [
            Block(
                Attention(block, parts, f"layers.{number}", self.matrices),
                ffn(own, f"layers.{number}.ffn", self.matrices, norm_of(block.norms[1])),
            )
            for number, (block, own) in enumerate(zip(parts.blocks, found, strict=True))
        ]
        self.pads: Tensor | None = None
        self.seen = 0
        self.chain: tuple[object, TokenChain | None] | None = None
        """The one call for a token, after what it is for."""

    def warm(self, sequences: int) -> None:
        """Compile what decoding so many sequences needs."""
        one_B = torch.zeros(sequences, dtype=torch.int64)
        self.begin(one_B.unsqueeze(1), places=2)
        self.next(one_B)

    @torch.inference_mode()
    def begin(self, ids_BS: Tensor, pads_B: Tensor | None = None, places: int | None = None) -> Tensor:
        """Read prompts, and return the logits [B, V] of what comes after them.

        Args:
            ids_BS: tokens, those of shorter prompts at the right end.
            pads_B: how many of each are not its own; None: none.
            places: most tokens that there will be, with the prompt's; None: as many as there are positions.

        Raises:
            InputError: more tokens than the model has positions.
        """
        sequences, length = ids_BS.shape
        wanted = places or self.positions or length
        if self.positions is not None and max(wanted, length) > self.positions:
            raise InputError(
                f"the prompt has {length} tokens, {max(wanted, length)} with what is to be written, and the model "
                f"{self.positions} positions; use fewer"
            )
        padded = pads_B is not None and bool(pads_B.any())
        self.pads, self.seen, self.chain = pads_B if padded else None, 0, None
        self.angles = None if self.rotary is None else angles_of(self.rotary, wanted)
        first_B = torch.zeros(sequences, dtype=torch.int64) if self.pads is None else self.pads.contiguous()
        turned = 0 if self.angles is None else self.angles[0].shape[-1]
        for block in self.blocks:
            block.attention.reserve(first_B, wanted, self.matrices.many, self.matrices.scratch, turned)
        return self._step(ids_BS)

    @torch.inference_mode()
    def next(self, ids_B: Tensor) -> Tensor:
        """Return the logits [B, V] after one token more of each sequence."""
        if (chain := self._chain_for(len(ids_B))) is None:
            return self._step(ids_B.unsqueeze(1))
        x_BD, angles, place = self._embedded(ids_B), None, self.seen
        index = place if self.pads is None else place - self.pads
        if self.places is not None:
            x_BD = x_BD + self.places[index]
        if self.angles is not None:
            angles = (self.angles[0][index], self.angles[1][index])
        self.seen += 1
        return chain(x_BD, self.seen, angles)

    def _chain_for(self, sequences: int) -> TokenChain | None:
        """Return the one call for a token of each sequence; None where there is none, or it would not be faster."""
        layers = [(block.attention, block.ffn) for block in self.blocks]
        modes = [own.mode() for _, own in layers if isinstance(own, ByNeuron)]
        purpose = (sequences, torch.get_num_threads(), modes)
        if self.chain is None or self.chain[0] != purpose:
            found, chain = chainable(layers, self.head, sequences), None
            if found is not None:
                width = self.head.weight.rows_ND.shape[1]
                chain = TokenChain(found, self.head, width, sequences, parallel=self.parallel)
            self.chain = (purpose, chain)
        return self.chain[1]

    def _step(self, ids_BS: Tensor) -> Tensor:
        sequences, length = ids_BS.shape
        x_BSD = self._embedded(ids_BS)
        places_BS = torch.arange(self.seen, self.seen + length).unsqueeze(0)
        dtype = self.matrices.many
        plain = length > 1 and self.seen + length <= MOST_PLAIN and dtype == torch.bfloat16
        mask = bias = None
        if self.pads is not None or plain:
            mask = self._mask(places_BS)
            bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf) if plain else None
        if self.pads is not None:
            places_BS = (places_BS - self.pads.unsqueeze(1)).clamp_min(0)
        angles = None
        if self.angles is not None:
            angles = (self.angles[0][places_BS].unsqueeze(1), self.angles[1][places_BS].unsqueeze(1))
        if self.places is not None:
            x_BSD = x_BSD + self.places[places_BS]
        step = Step(self.seen, angles, mask, bias)
        x_TD = x_BSD.view(sequences * length, -1)
        for block in self.blocks:
            after_TD = block.attention(x_TD, x_TD, step)
            x_TD = block.ffn(x_TD if self.parallel else after_TD, after_TD)
        self.seen += length
        return self.head(x_TD.view(sequences, length, -1)[:, -1].contiguous()).float()

    def _mask(self, places_BS: Tensor) -> Tensor:
        """Return what each place attends to, [B or 1, 1, S, P]: itself and what is before it but the padding."""
        keys, own = torch.arange(int(places_BS[0, -1]) + 1), places_BS.unsqueeze(2)
        mask = keys <= own
        if self.pads is not None:  # a place of padding attends to itself: no row may be empty
            mask = (mask & (keys >= self.pads.view(-1, 1, 1))) | (keys == own)
        return mask.unsqueeze(1)

    def _embedded(self, ids: Tensor) -> Tensor:
        rows, scale = self.tokens or self.head.weight
        found = rows[ids].float()
        return found if scale is None else found * scale[ids].unsqueeze(-1)


def _check_widths(parts: Parts, ffns: list[FFNParts]) -> None:
    """Refuse 8 bits where our loops cannot multiply them.

    Raises:
        InputError: says which numbers fit.
    """
    widths = {parts.tokens.weight.shape[1], parts.heads * parts.head_dim}
    widths |= {d_in(each.down) for each in ffns if not each.is_compiled}
    for width in sorted(widths):
        if (reason := why_no_loops(width, torch.float32)) is not None:
            raise InputError(f"weights=int8 {reason}; use weights=bfloat16 or float32")
