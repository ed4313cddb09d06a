"""All layers for one token of each sequence, as one call of compiled code.

    x -> [norm, projections] -> attention -> [+ output] -> [norm, FFN] -> ... -> [norm, head] -> logits

Each of these is a call that is compiled anyway (`compute/cpu/decode`). Called one after the other, half of the time of
a small model is Python's. So what they read and write is laid out once, and from token to token only what is new is
told: the embedding, how far the cache is filled, and the angles of the place.

Shapes: B sequences, D d_model, H heads, G heads of keys and values, C numbers in a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from switchable.compute.cpu.tasks import Chain, Run, floats
from switchable.infer.decoding.attention import Attention
from switchable.infer.decoding.ffn import FFN, ByNeuron
from switchable.infer.decoding.matrices import Matrix

Layer = tuple[Attention, ByNeuron]


def chainable(layers: Sequence[tuple[Attention, FFN]], head: Matrix, sequences: int) -> list[Layer] | None:
    """Return the layers if every part of them is one compiled call for so many sequences, else None."""
    found = [(attention, own) for attention, own in layers if isinstance(own, ByNeuron)]
    fits = len(found) == len(layers) and sequences <= head.most
    for attention, own in found:
        parts = (attention.qkv, attention.out)
        fits = fits and attention.joins and attention.attend is not None
        fits = fits and all(sequences <= part.most for part in parts) and own.compiles(sequences)
    return found if fits else None


class TokenChain:
    """The calls for one token, as long as the cache and the weights stay where they are.

    Args:
        layers: of the model.
        head: what follows them.
        width: D.
        sequences: B.
        parallel: whether an FFN reads what its layer's attention does.
    """

    def __init__(self, layers: Sequence[Layer], head: Matrix, width: int, sequences: int, *, parallel: bool):
        x_BD, other_BD, after_BD = floats(3, sequences, width).unbind(0)
        self.x_BD, self.attends, runs = x_BD, list[int](), list[Run]()
        self.memory: list[Tensor] = [x_BD, other_BD, after_BD]
        for attention, own in layers:
            attend = attention.attend
            assert attend is not None
            qkv_BN, mixed_BN = floats(sequences, len(attention.qkv.weight.rows_ND)), floats(attend.shape)
            self.memory += [qkv_BN, mixed_BN]
            runs.append(attention.qkv.call_for(sequences).told(x_BD, qkv_BN))
            self.attends.append(len(runs))
            runs.append(attend.told(qkv_BN.view(sequences, -1, attention.size), mixed_BN))
            runs.append(attention.out.call_for(sequences, adds=True).told(mixed_BN, after_BD, x_BD))
            runs.append(own.call_for(sequences).told(x_BD if parallel else after_BD, other_BD, after_BD))
            x_BD, other_BD = other_BD, x_BD
        self.head = head.call_for(sequences)
        runs.append(self.head.told(x_BD, x_BD))  # where it writes is told with each token
        self.chain = Chain(runs)

    def __call__(self, x_BD: Tensor, end: int, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the logits [B, V] for embeddings of the tokens in place `end` - 1.

        `angles` are cos and signed sin, [turned] or [B, turned], contiguous; None where nothing is turned.
        """
        self.x_BD.copy_(x_BD)
        logits_BV = floats(self.head.shape)
        self.chain.tell(-1, y=logits_BV)
        told: dict[str, Tensor | int] = {"end": end}
        if angles is not None:
            step = angles[0].shape[-1] if angles[0].ndim > 1 else 0
            told |= {"cos": angles[0], "sin": angles[1], "angle_step": step}
        for number in self.attends:
            self.chain.tell(number, **told)
        self.chain()
        return logits_BV
