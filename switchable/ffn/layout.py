"""Where a neuron's weights lie in memory: side by side, so that an expert is one block of it.

    shape   as the model has it: nn.Linear's down.weight [D, F], transformers' Conv1D c_fc.weight [D, F]
    strides (D, 1) neuron by neuron:    row i of `neurons_first(projection)` is contiguous

Of the two projections of an FFN one always has its neurons in columns. A slice of it is then D pieces of I numbers,
each on another page of memory: slow to read when decoding, and its gradient cannot be summed row by row. So `convert`
transposes that one's *storage*. Names, shapes and values stay as they were, and so does the dense product, to the
rounding of its last bits (BLAS takes either order); gradients and element-wise optimizers' moments take over the
strides of their parameter by themselves.

What wants its parameters contiguous (`fully_shard`, `parameters_to_vector`, LBFGS) is served by `store_by_row`, and
so is everything where nothing would gain: a recipe without sparse steps, a GPU. On a CPU decoding in sparse mode has no
other loops. Parameters that have several names (Zamba's layers share theirs) stay, too: `save_pretrained` looks for
those that share memory, and takes them to be contiguous. Files are written contiguous in any case.

Shapes: D d_model, F d_ff, I neurons per expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from switchable.ffn.families import neuron_dim
from switchable.ffn.layer import SwitchableFFN


def neuron_parameters(layer: SwitchableFFN) -> Iterator[tuple[Tensor, int]]:
    """Yield every parameter with a neuron axis, and which dimension that is; a fused projection's has 2F entries."""
    for path, projection in layer.ssd.projections:
        output = path == layer.ssd.settings.family.down
        yield projection.weight, neuron_dim(projection, output)
        if projection.bias is not None and not output:
            yield projection.bias, 0


def entries(layer: SwitchableFFN, perm_F: Tensor, size: int) -> Tensor:
    """Return the order of the entries along a neuron axis of some size if the neurons are put in an order."""
    if size == len(perm_F):
        return perm_F
    if (layer.ssd.settings.family.fused or "").endswith("interleaved"):
        return torch.stack([2 * perm_F, 2 * perm_F + 1], dim=1).flatten()
    return torch.cat([perm_F, perm_F + len(perm_F)])


def store_by_neuron(layer: SwitchableFFN, but: Collection[Tensor] = ()) -> None:
    """Lay out a layer's weights so that each neuron's are contiguous, in place; a second call changes nothing."""
    kept = {id(each) for each in but}
    for parameter, dim in neuron_parameters(layer):
        if id(parameter) not in kept and parameter.ndim == 2 and parameter.stride(1 - dim) != 1:
            parameter.data = parameter.data.t().contiguous().t()


def of_several_names(model: nn.Module) -> list[Tensor]:
    """Return the parameters that stand in a model more than once."""
    names = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    return [parameter for parameter, times in names.items() if times > 1]


def store_by_row(layer: SwitchableFFN) -> None:
    """Lay out a layer's weights as `torch.empty` would, in place: every parameter contiguous."""
    for parameter, _ in neuron_parameters(layer):
        parameter.data = parameter.data.contiguous()
