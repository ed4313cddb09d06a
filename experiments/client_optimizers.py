"""Optimizers that nobody here wrote: does training go on after a regrouping as if the neurons had not moved?

    python -m experiments.clients --optimizers

A small converted GPT-2 takes three steps, is regrouped, and takes three more; beside it the same without regrouping.
Each optimizer is `moves` (the same weights, to 1 % of the way they have gone since), `refused` (by `Controller.step` at
the first step, nothing changed), `WRONG`, or `cannot run` (an error of its own). State of 8 bits or fewer is rounded
once more when it moves: to a fifth of what state left behind would do. What wants contiguous parameters is given them.
torch.optim's are always tried; pytorch_optimizer's, bitsandbytes', torchao's and schedulefree's where these packages
are installed. One line an optimizer; the last line is JSON with the counts. The exit code is 0 only if none is wrong.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from switchable import InputError, SwitchConfig, convert
from switchable.ffn.convert import layers_of
from switchable.ffn.layout import neuron_parameters
from switchable.switching.controller import Controller
from switchable.switching.optimizers import optimizers_in
from switchable.switching.packed import packed_in
from switchable.switching.switch import current_structure, regroup

Build = Callable[[list[nn.Parameter]], Any]
CONFIG = SwitchConfig(num_experts=8, experts_per_token=3)
STEPS = 3
CLOSE = 0.01
"""Of the way that the weights have gone since the regrouping."""
BEHIND = 0.2
"""Of the way that state left behind leads astray."""
NOT_TRIED = {"SparseAdam", "Optimizer"}


def optimizers() -> Iterator[tuple[str, Build]]:
    """Yield name and builder of each optimizer that can be imported."""
    for name in dir(torch.optim):
        if name[0].isupper() and name not in NOT_TRIED:
            kind = getattr(torch.optim, name)
            yield f"torch {name}", _with_adamw(kind) if name == "Muon" else kind
    yield "torch Adam amsgrad", lambda p: torch.optim.Adam(p, amsgrad=True)
    yield "torch SGD momentum", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    yield "torch AdamW fused", lambda p: torch.optim.AdamW(p, fused=True)
    if importlib.util.find_spec("pytorch_optimizer"):
        yield from _of_pytorch_optimizer()
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes.optim as theirs

        for name in ("Adam", "AdamW", "Adam8bit", "AdamW8bit", "Lion", "Lion8bit", "SGD8bit", "AdEMAMix"):
            more = {"lr": 0.1, "momentum": 0.9} if name == "SGD8bit" else {}
            yield f"bitsandbytes {name}", _with(getattr(theirs, name), more)
    if importlib.util.find_spec("torchao"):
        import torchao.optim as quantised

        for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8"):
            yield f"torchao {name}", _with(getattr(quantised, name), {"block_size": 64})
    if importlib.util.find_spec("schedulefree"):
        import schedulefree

        for name in ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"):
            yield f"schedulefree {name}", _with(getattr(schedulefree, name), {"lr": 0.01})
        yield (
            "schedulefree ScheduleFreeWrapper",
            lambda p: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.1), momentum=0.9),
        )


def _of_pytorch_optimizer() -> Iterator[tuple[str, Build]]:
    import pytorch_optimizer as theirs

    for name in sorted(theirs.get_supported_optimizers()):
        kind = theirs.load_optimizer(name)
        if kind.__module__.startswith("pytorch_optimizer"):
            yield f"pytorch_optimizer {name}", kind
    yield "pytorch_optimizer Lookahead", lambda p: theirs.Lookahead(torch.optim.AdamW(p), k=2)
    yield "pytorch_optimizer ScheduleFreeWrapper", lambda p: theirs.ScheduleFreeWrapper(torch.optim.AdamW(p))
    yield "pytorch_optimizer OrthoGrad", lambda p: theirs.OrthoGrad(torch.optim.AdamW(p))
    yield "pytorch_optimizer TRAC", lambda p: theirs.TRAC(torch.optim.AdamW(p))
    yield "pytorch_optimizer PCGrad", lambda p: theirs.PCGrad(torch.optim.AdamW(p))


def _with(kind: Any, settings: dict[str, Any]) -> Build:
    return lambda params: kind(params, **settings)


def _with_adamw(kind: Any) -> Build:
    """For matrices only: AdamW for the rest."""
    return lambda p: [kind([x for x in p if x.ndim == 2]), torch.optim.AdamW([x for x in p if x.ndim != 2])]


def attempt(build: Build, neuron_major: bool | None = None) -> tuple[str, str]:
    """Train, regroup and go on; return the verdict and the reason."""
    try:
        model, optimizer, tokens = _begin(build, neuron_major)
        unmoved, its_optimizer, _ = _begin(build, neuron_major)
    except Exception as error:  # noqa: BLE001 - whatever somebody else's code raises before ours is asked
        return "cannot run", f"{type(error).__name__}: {error}".splitlines()[0][:90]
    before = [p.detach().clone() for p in model.parameters()]
    try:
        Controller(model, tokens, total_steps=100, config=CONFIG).step(optimizer)
    except InputError as error:
        if "neuron_major=False" in str(error):
            return attempt(build, neuron_major=False)
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        return ("refused" if same else "WRONG"), str(error)[:150]
    generator = torch.Generator().manual_seed(3)
    wanted = [
        current_structure(each)[torch.randperm(each.ssd.d_ff, generator=generator)]
        for each in layers_of(model)
    ]
    found = optimizers_in(optimizer)
    perms = regroup(layers_of(model), wanted, found)
    start = {id(p): p.detach().clone() for p in unmoved.parameters()}
    _train(model, optimizer, tokens, STEPS)
    _train(unmoved, its_optimizer, tokens, STEPS)
    share = _apart(model, unmoved, perms, start)
    if share <= CLOSE:
        return "moves", f"{share:.1e} of the way"
    if any(packed_in(each.state.get(p, {}), p) for each in found for p in model.parameters()):
        left, optimizer, _ = _begin(build, neuron_major)
        regroup(layers_of(left), wanted)
        _train(left, optimizer, tokens, STEPS)
        behind = _apart(left, unmoved, perms, start)
        told = f"{share:.1e} of the way, with state left behind {behind:.1e}"
        return "moves" if share <= BEHIND * behind else "WRONG", told
    # Some amplify rounding (D-adaptation, KATE, Muon in bfloat16): then noise of its size does the same.
    noisy, optimizer, _ = _begin(build, neuron_major)
    with torch.no_grad():
        for p in noisy.parameters():
            p.mul_(1 + 1e-6 * torch.randn_like(p))
    _train(noisy, optimizer, tokens, STEPS)
    noise = _apart(noisy, unmoved, [None] * len(perms), start)
    verdict = "moves" if share <= 3 * noise else "WRONG"
    return verdict, f"{share:.1e} of the way, noise of 1e-6 in the weights {noise:.1e}"


def _apart(
    model: nn.Module, other: nn.Module, perms: Sequence[Tensor | None], start: dict[int, Tensor]
) -> float:
    """How far two models are apart in their neurons, over the way that the other has gone."""
    off = way = 0.0
    for layer, theirs, perm in zip(layers_of(model), layers_of(other), perms, strict=True):
        for (p, dim), (q, _) in zip(neuron_parameters(layer), neuron_parameters(theirs), strict=True):
            off += float((p - (q if perm is None else q.index_select(dim, perm))).square().sum())
            way += float((q - start[id(q)]).square().sum())
    return (off / way) ** 0.5 if way else float("inf")


def _begin(build: Build, neuron_major: bool | None) -> tuple[nn.Module, Any, Tensor]:
    """A model that has been trained for a few steps, its optimizer, and what it is trained on; always the same."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=32, n_embd=64, n_layer=2, n_head=2, activation_function="relu")
    )
    convert(model, CONFIG, neuron_major=neuron_major)
    for layer in layers_of(model):
        layer.ssd.router_learns = (
            False  # other experts, other losses: some optimizers let that count everywhere
        )
    tokens = torch.randint(0, 61, (4, 24))
    optimizer = build(list(model.parameters()))
    _train(model, optimizer, tokens, STEPS)
    return model, optimizer, tokens


def _train(model: nn.Module, optimizer: Any, tokens: Tensor, steps: int) -> None:
    def closure() -> Tensor:
        for each in every:
            each.zero_grad()
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    every = optimizer if isinstance(optimizer, list) else [optimizer]
    for each in every:
        if hasattr(each, "train"):
            each.train()
    torch.manual_seed(1)
    for _ in range(steps):
        loss = closure()
        for each in every:
            if isinstance(each, torch.optim.LBFGS):
                each.step(closure)
            elif hasattr(each, "pc_backward"):
                each.pc_backward([loss])
            else:
                each.step()
