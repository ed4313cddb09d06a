"""What sparse mode can compute: projections that are their weight and bias, and nothing besides.

Dense mode calls the modules, with all that hangs on them. Sparse mode multiplies rows of their weights, so it would
pass by an adapter around a projection, a hook on it, a mask of torch's pruning (a hook too). It is refused there: with
all experts on it must be the dense layer. A parametrization is no trouble: the weight is what it computes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from switchable.errors import InputError
from switchable.ffn.families import d_in
from switchable.ffn.placement import Entrance, Exit, Factor, Held
from switchable.ffn.recording import close, kept
from switchable.ffn.ssd import SSD
from switchable.ranks import has_plain_type

FORWARDS = {kind.forward for kind in (nn.Linear, Conv1D, Entrance, Factor, Exit)}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
MERGE = (
    "merge it into the weight (peft: merge_and_unload(); torch's pruning: prune.remove), remove the hook, or"
)
PASSED_BY = f"which sparse mode passes by; {MERGE} stay in dense mode"


def check_plain(ssd: SSD) -> None:
    """Raise InputError for an FFN with something on its projections or activation that sparse mode would pass by."""
    for path, module in ssd.called:
        where = f"{ssd.name}.{path}"
        if module is ssd.activation:
            if type(module) is not ssd.activation_kind:
                raise InputError(
                    f"{where} has become a {type(module).__name__}, and sparse mode computes "
                    f"{ssd.settings.activation}; exchange the activation before convert"
                )
        elif type(module).forward not in FORWARDS | ssd.own_forwards or "forward" in vars(module):
            raise InputError(f"{where} is a {type(module).__name__}, {PASSED_BY}")
        weight = module._parameters.get("weight")
        if weight is not None and not has_plain_type(weight):
            raise InputError(
                f"{where} has been quantised ({type(weight).__name__}), and sparse mode reads rows of the weight; stay "
                "in dense mode, or quantise what has no experts (`switchable generate --weights int8` reads 8 bits)"
            )
        if any(getattr(module, hooks) for hooks in HOOKS) and not isinstance(module, Held):
            raise InputError(f"{where} has hooks (or a mask), {PASSED_BY}")


def own_forwards(ssd: SSD) -> frozenset[Any]:
    """Return forwards of classes that do what `nn.Linear`'s does, as casting weights; InputError if one does more."""
    found = set()
    for path, module in ssd.projections:
        if (own := type(module).forward) in FORWARDS:
            continue
        if not _multiplies(module):
            raise InputError(
                f"{ssd.name}.{path} ({type(module).__name__}) is more than its weight and bias; {MERGE} "
                "use nn.Linear"
            )
        found.add(own)
    return frozenset(found)


def _multiplies(module: nn.Linear) -> bool:
    """Whether a projection returns x · weightᵀ + bias, with its slope, in training too."""
    if {name for name, _ in module.named_parameters()} - {"weight", "bias"} or module.weight.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(module.weight)

    values = {name: random(*parameter.shape) for name, parameter in module.named_parameters()}
    weight = values["weight"].T if isinstance(module, Conv1D) else values["weight"]
    with kept(module.modules(), "training"), torch.enable_grad():
        for training in (False, True):
            module.train(training)
            x = random(2, 3, weight.shape[1]).requires_grad_()
            theirs = torch.func.functional_call(module, values, (x,))
            ours = nnf.linear(x, weight, values.get("bias"))
            slopes = [torch.autograd.grad(y.square().sum(), x)[0] for y in (theirs, ours)]
            if not close(theirs, ours) or not close(*slopes):
                return False
    return True


def check_movable(ssd: SSD) -> None:
    """Raise InputError for an FFN whose neurons cannot move: a projection is more than a weight and a bias."""
    check_plain(ssd)
    for path, module in ssd.called:
        if parametrize.is_parametrized(module):
            raise InputError(
                f"{ssd.name}.{path} has a parametrization, which does not move with the neurons; remove it "
                "(torch.nn.utils.parametrize.remove_parametrizations), or train with recipe dense"
            )


def check_readable(ssd: SSD) -> None:
    """Raise InputError where it is hidden which way a weight lies: dense mode calls it, measures read the weight."""
    for path, module in ssd.projections:
        width = ssd.d_ff if path == ssd.settings.family.down else ssd.d_model
        hides = not isinstance(module, Conv1D) and any(isinstance(part, Conv1D) for part in module.modules())
        if hides or not isinstance(getattr(module, "weight", None), Tensor) or d_in(module) != width:
            raise InputError(
                f"{ssd.name}.{path} has become a {type(module).__name__}, whose weight cannot be measured; put "
                "adapters on other modules, or merge them into the weight (peft: merge_and_unload())"
            )
