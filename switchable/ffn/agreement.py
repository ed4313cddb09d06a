"""Which families a model's FFNs are, and that the model computes with switchable FFNs what it did before.

The table's rows that exchange a module compare that module alone (`convert`). All else, found or described, is compared
as a whole model: outputs in evaluation, outputs and gradients in training with the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from switchable.errors import InputError
from switchable.ffn.families import HOW_TO_DESCRIBE, Family
from switchable.ffn.finder import find_families, named, refuse_others
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.placement import put_into_layer
from switchable.ffn.recording import distance, kept, tolerance
from switchable.ffn.table import row_of
from switchable.ffn.trial import FAILURES, Inputs, Trial, module_state
from switchable.options import checked

LOOSE = 10.0
"""Times the rounding of one layer that whole models may differ."""


def families_of(
    model: nn.Module,
    given: Family | Sequence[Family] | None = None,
    example_inputs: Inputs | None = None,
    trusted: bool = False,
) -> tuple[list[Family], Trial | None, dict[str, str]]:
    """Return what a model's FFNs are, the trial in which that can be checked, and what was found to be left alone.

    The trial is None where nothing need or can be checked. Raises InputError if no FFNs are described, known or found.
    """
    row = row_of(model) if given is None else None
    if given is None and row is None:
        with module_state(model):  # a parametrization's, in training, change as its weight is looked at
            refuse_others(model)
            trial = Trial(model, example_inputs, named(model))
            families, others = find_families(model, trial)
            return families, trial, others
    listed = given if isinstance(given, list | tuple) else [given or row]
    if not (families := [checked("family", each, Family) for each in listed]):
        raise InputError(f"family={given} describes no FFN; {HOW_TO_DESCRIBE}")
    trusted = trusted or (row is not None and not row.in_layer and example_inputs is None)
    try:
        return families, None if trusted else Trial(model, example_inputs), {}
    except InputError:
        if example_inputs is not None:
            raise
        return families, None, {}


@torch.no_grad()
def check_same_function(ffn: nn.Module, layer: SwitchableFFN) -> None:
    """Raise InputError unless an FFN does on two tokens what the module that it replaces did: a part left out shows."""
    ssd = layer.ssd
    x_BSD = ssd.two_tokens_TD.unsqueeze(0)
    if x_BSD.is_meta:
        return
    with kept([*ffn.modules(), *layer.modules()], "training"):
        try:
            before, after = ffn.eval()(x_BSD), layer.eval()(x_BSD)
        except TypeError as error:
            raise InputError(f"{ssd.name}: {error}; an FFN takes hidden states and nothing else") from None
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        raise InputError(
            f"{ssd.name} ({type(ffn).__name__}) computes something else than {ssd.settings.family}; "
            "has it a part that is not described (a gate, a norm, a factor)?"
        )


def put_in_place(
    model: nn.Module, built: Sequence[tuple[str, nn.Module, SwitchableFFN]], trial: Trial | None
) -> None:
    """Put switchable FFNs in a model; each comes with the name of the module that held the projections, and the module.

    Raises InputError, with all undone, if a trial shows that the model computes something else with them.
    """
    before = None if trial is None else trial.answers()
    undo = [_place(model, *each) for each in built]
    if trial is None or before is None:
        return
    ssds = [layer.ssd for _, _, layer in built]
    problem = None
    with kept(ssds, "activation_l1", "router_learns"):
        for ssd in ssds:
            ssd.activation_l1, ssd.router_learns = 0.0, False
        try:
            if not _same(before, trial.answers()):
                problem = "the model computes something else with it"
        except FAILURES as error:
            problem = f"the model fails with it ({error})".splitlines()[0]
    if problem is None:
        return
    for each in reversed(undo):
        each()
    raise InputError(
        f"{ssds[0].settings.family} does not describe what {ssds[0].name} computes: {problem}; are gate "
        f"and up in the right places, and is there a part that is not described (a norm, a factor, a dropout)? "
        f"{HOW_TO_DESCRIBE}"
    )


def _place(model: nn.Module, name: str, ffn: nn.Module, layer: SwitchableFFN) -> Callable[[], None]:
    """Put a switchable FFN in its place; return what undoes it."""
    if layer.ssd.settings.family.in_layer:
        return put_into_layer(ffn, layer.ssd.settings.family, layer)
    model.set_submodule(name, layer)
    return partial(model.set_submodule, name, ffn)


def _same(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    if len(before) != len(after):
        return False
    scale = max((float(y.abs().max()) for y in before if y.numel()), default=0.0)
    return all(
        distance(b, a) <= LOOSE * tolerance(a) or float((b - a).abs().max()) <= 1e-6 * scale
        for a, b in zip(before, after, strict=True)
        if a.numel()
    )
