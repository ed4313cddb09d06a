"""What sparse mode can compute: projections that are their weight and bias, and nothing besides.

Dense mode calls the modules, with all that hangs on them. Sparse mode multiplies rows of their weights, so it would
pass by an adapter around a projection, a hook on it, a mask of torch's pruning (a hook too). It is refused there: with
all experts on it must be the dense layer. A parametrization is no trouble: the weight is what it computes.
"""

from __future__ import annotations

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
        if module is not ssd.activation and (
            type(module).forward not in FORWARDS or "forward" in vars(module)
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
