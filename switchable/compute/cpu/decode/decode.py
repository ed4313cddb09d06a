"""`decode`: few tokens without gradients, where reading the weights is all that costs time.

    bytes read = tokens · K · I · D · (1 + share of neurons that fire)     against  2 · F · D for the dense layer

For ReLU and squared ReLU in float32 one call of compiled code does it (`compiled.py`), up to 63 tokens.

All else is done in operations of torch, token by token: each reads only the rows of its own experts, in as few calls as
possible. The experts' rows of `up` are gathered into one small buffer, which the product then finds in the cache; very
large ones are multiplied where they are. Of `down` only the rows of neurons whose activation is not zero are read:
y = Σ h_i down_i over them is what `embedding_bag` computes, without a copy. Small experts are gathered there, too: two
calls instead of six. All this wants an expert to be one block of memory (`ffn/layout.py`); other layouts work, slower.

As soon as the tokens together need most of the experts, this loses to the two large products of `masked`.

Any activation, gated or not. A graph break under `torch.compile`.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token, N = K·I neurons of a
token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from switchable.compute.call import RELU_TYPES, Backend, ExpertCall
from switchable.compute.cpu.decode.compiled import prepare_call
from switchable.compute.cpu.limits import check_ids

LARGEST_SHARE = 0.75
"""Most expert visits (T·K) per expert for which reading selected rows is faster; measured on 2 cores, D 256 to 768."""
COPIED_UP_BYTES = 2**22
"""Most bytes of `up` that are gathered for a token."""
COPIED_DOWN_BYTES = 2**20
"""Most bytes of `down` that are gathered; above, finding the neurons that fire costs less than reading the others."""
