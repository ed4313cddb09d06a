"""What sparse mode can compute: projections that are their weight and bias, and nothing besides.

Dense mode calls the modules, with all that hangs on them. Sparse mode multiplies rows of their weights, so it would
pass by an adapter around a projection, a hook on it, a mask of torch's pruning (a hook too). It is refused there: with
all experts on it must be the dense layer. A parametrization is no trouble: the weight is what it computes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from switchable.errors import InputError
from switchable.ffn.placement import Entrance, Exit, Factor, Held
from switchable.ffn.ssd import SSD

FORWARDS = {kind.forward for kind in (nn.Linear, Conv1D, Entrance, Factor, Exit)}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
REMEDY = (
    "merge it into the weight (peft: merge_and_unload(); torch's pruning: prune.remove), remove the hook, or stay in "
    "dense mode"
)


def check_plain(ssd: SSD) -> None:
    """Refuse an FFN with something on its projections or activation that sparse mode would pass by.

    Raises:
        InputError: names it, and what to do.
    """
    for path, module in ssd.called:
        forward = type(module).forward
        if module is not ssd.activation and (
            "forward" in vars(module) or not (forward in FORWARDS or forward in ssd.linear_forwards)
        ):
            raise InputError(
                f"{ssd.name}.{path} is a {type(module).__name__}, which sparse mode passes by; {REMEDY}"
            )
        if any(getattr(module, hooks) for hooks in HOOKS) and not isinstance(module, Held):
            raise InputError(
                f"{ssd.name}.{path} has hooks (or a mask), which sparse mode passes by; {REMEDY}"
            )


def check_movable(ssd: SSD) -> None:
    """Refuse to move the neurons of an FFN whose projections are more than a weight and a bias.

    Raises:
        InputError: names it, and what to do.
    """
    check_plain(ssd)
    for path, module in ssd.called:
        if parametrize.is_parametrized(module):
            raise InputError(
                f"{ssd.name}.{path} has a parametrization, which does not move with the neurons; remove it "
                "(torch.nn.utils.parametrize.remove_parametrizations), or train with recipe dense"
            )


def check_convertible(ssd: SSD) -> None:
    """Refuse to convert an FFN of which sparse mode would miss a part.

    A subclass of `nn.Linear` may compute its weight and bias in its own way, as in its input's precision.

    Raises:
        InputError: names the part, and what to do.
    """
    ssd.linear_forwards = {
        type(module).forward
        for _, module in ssd.called
        if isinstance(module, nn.Linear) and type(module).forward not in FORWARDS and _is_linear(module)
    }
    check_plain(ssd)


@torch.no_grad()
def _is_linear(module: nn.Linear) -> bool:
    """Return whether a module multiplies two tokens by its weight and adds its bias."""
    weight = module.weight
    if weight.is_meta:
        return False
    x = torch.linspace(-1, 1, 2 * module.in_features).sin().view(2, -1).to(weight.device, weight.dtype)
    return torch.allclose(module(x), nnf.linear(x, weight, module.bias), rtol=1e-3, atol=1e-5)
