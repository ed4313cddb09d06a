"""One batch through a model, as if nobody had looked: to see what its layers do, and that they still do it.

A trial shakes small parameters, so that a norm, a bias or a scale that does nothing yet shows, and gives weights that
are all the same (zero, as output projections often start) random values. When it is over, every weight, buffer,
random number and setting is what it was, bit for bit.

The batch is the user's, or made of what the model says of itself: its forward's arguments and its config.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from switchable.errors import InputError
from switchable.ffn.families import PROJECTIONS, d_in
from switchable.ffn.recording import Modules, recorded
from switchable.options import checked

FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError
)  # fmt: skip
"""What a model raises that is given what it cannot take."""
SMALL = 1 << 16
"""Numbers of the largest parameter that is shaken in any case: norms, biases and scales are smaller."""
TOKENS = 12
"""Of each of the sequences made: pieces of 2, 3, 4 and 6 fit."""
GIVE = "give a batch that the model takes: convert(..., example_inputs={...} or a tensor)"

Inputs = Mapping[str, Any] | Sequence[Any] | Tensor


class Trial:
    """A model and a batch that it takes: `given`, by name, in order or the only one, or one made here.

    Calls of the modules `watched`, in evaluation, are kept as `seen`.

    Raises:
        InputError: the model is on the meta device, or fails with the batch.
    """

    def __init__(self, model: nn.Module, given: Inputs | None = None, watched: Modules = ()) -> None:
        self.model = model
        parameters = list(model.parameters())
        if not parameters or any(p.is_meta for p in parameters):
            raise InputError(
                "a model on the meta device (or without parameters) has no numbers to look at; load it first, or "
                "describe its FFNs: convert(model, config, family=Family(...))"
            )
        real = [p for p in parameters if p.is_floating_point() and p.numel()]
        # Without norms and biases none may be small; gradients are compared by one in any case.
        self._shaken = [p for p in real if _is_shaken(p)] or sorted(real, key=Tensor.numel)[:1]
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        problems = []
        for self._arguments in [_as_arguments(given)] if given is not None else made(model):
            try:
                with self.undisturbed(), torch.no_grad(), recorded(watched) as self.seen:
                    self._first: list[Tensor] | None = self._copied(self.run(training=False))
                return
            except InputError as error:
                problems.append(error)
        unknown = InputError(f"the inputs of {type(model).__name__} are not known; {GIVE}")
        raise problems[-1] if problems else unknown

    def run(self, training: bool) -> list[Tensor]:
        """Return all tensors of real numbers that the model returns, random numbers fixed; InputError if it fails."""
        self.model.train(training)
        torch.manual_seed(0)
        args, named = self._arguments
        try:
            return list(_tensors(self.model(*args, **named)))
        except FAILURES as error:
            when = "in training" if training else "in evaluation"
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            kind = type(self.model).__name__
            raise InputError(f"{kind} cannot be tried out {when} ({why}); {GIVE}") from None

    def answers(self) -> list[Tensor]:
        """Return what the model computes in evaluation, then outputs and gradients of training."""
        with self.undisturbed():
            with torch.no_grad():
                found, self._first = self._first or self._copied(self.run(training=False)), None
            with torch.enable_grad():
                outputs = [y for y in self.run(training=True) if y.requires_grad]
                found = found + self._copied(outputs)
                if outputs:
                    total = sum((y.double() * _ramp(y).cos()).sum() for y in outputs)
                    wanted = [p for p in self._shaken if p.requires_grad]
                    grads = torch.autograd.grad(total, wanted, allow_unused=True)  # type: ignore[arg-type]
                    found += [torch.zeros(()) if g is None else g for g in grads]
            return found

    @staticmethod
    def _copied(outputs: Sequence[Tensor]) -> list[Tensor]:
        return [y.detach().clone() for y in outputs]

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within the `with` block the model is shaken; afterwards everything is as before."""
        with _random_state(self.model), module_state(self.model), _shaken(self._shaken):
            yield


def _is_shaken(p: Tensor) -> bool:
    if p.numel() <= SMALL or p.ndim < 2:
        return True
    rows = p.detach()[:: max(1, len(p) // 8)].flatten(1)[:, :64]
    return bool((rows == rows[0, 0]).all())


@contextmanager
def _shaken(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    kept = [(p.detach().clone(), p.requires_grad) for p in parameters]
    generator = torch.Generator().manual_seed(0)
    try:
        for p in parameters:
            noise = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
            size = p.detach().float().square().mean().sqrt()
            constant = p.ndim > 1 and bool((p.detach() == p.detach().flatten()[0]).all())
            p.requires_grad_(True)
            p.data.add_(noise * (p.shape[-1] ** -0.5 if constant else 0.2 * size if size > 0 else 0.2))
        yield
    finally:
        for p, (before, learns) in zip(parameters, kept, strict=True):
            p.data.copy_(before)
            p.requires_grad_(learns)


@contextmanager
def module_state(model: nn.Module) -> Iterator[None]:
    """Afterwards every module's buffers, and whether it trains and drops out, are as before."""
    modules, versions = list(model.modules()), [p._version for p in model.parameters()]
    owned = [(m, n, b) for m in modules for n, b in m._buffers.items()]
    buffers = [(m, n, b, None if b is None else b.detach().clone()) for m, n, b in owned]
    plain = [(m, {n: v for n, v in vars(m).items() if isinstance(v, bool | int | float)}) for m in modules]
    for module in modules:
        for name in [n for n, v in vars(module).items() if "layerdrop" in n and isinstance(v, float)]:
            setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if buffer is not None and value is not None and not torch.equal(buffer, value):
                buffer.detach().copy_(value)
        # RWKV scales its weights in evaluation and remembers that it has: then what it remembers stays, too.
        own = versions != [p._version for p in model.parameters()]
        for module, values in plain:
            vars(module).update(
                {n: v for n, v in values.items() if not own or n in ("training", "p") or "drop" in n}
            )


@contextmanager
def _random_state(model: nn.Module) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - some models draw from it
    with torch.random.fork_rng({p.device.index for p in model.parameters() if p.is_cuda}):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _as_arguments(given: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, Tensor):
        return (given,), {}
    return tuple(checked("example_inputs", given, Sequence)), {}


def made(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield batches that a model may take, the likeliest first."""
    known = inspect.signature(model.forward).parameters
    first = str(getattr(model, "main_input_name", ""))
    first = first if first in known else next(iter(known), "")
    by_name = first in known and known[first].kind is not inspect.Parameter.POSITIONAL_ONLY
    device = next(model.parameters()).device
    rest = {"use_cache": False} if "use_cache" in known else {}
    two_sides = getattr(getattr(model, "config", None), "is_encoder_decoder", True)
    for make in (_features, lambda *_: _ids(model, TOKENS), lambda *_: _ids(model, 8 * TOKENS), _rows):
        if (value := make(model, first)) is None:
            continue
        batch = {first: value}
        if "decoder_input_ids" in known and two_sides:
            batch["decoder_input_ids"] = _ids(model, TOKENS - 2)
        for masked in (False, True):
            if masked:
                ids = {name: each for name, each in batch.items() if name.endswith("input_ids")}
                masks = {name.replace("input_ids", "attention_mask"): each for name, each in ids.items()}
                batch |= {name: torch.ones_like(each) for name, each in masks.items() if name in known}
            here = {name: each.to(device) for name, each in batch.items()}
            yield ((), here | rest) if by_name else ((here.pop(first),), here | rest)
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        yield (), {n: each.to(device) for n, each in dummy.items() if isinstance(each, Tensor)} | rest


def _features(model: nn.Module, name: str) -> Tensor | None:
    """An image or a piece of sound, of the size that the config says; None if it does not, or for another input."""
    config: Any = getattr(model, "config", None)
    try:
        if name == "pixel_values":
            size = config.image_size
            return _noise(1, config.num_channels, *(size if isinstance(size, list | tuple) else (size, size)))
        if name == "input_features":
            return _noise(1, config.num_mel_bins, 2 * config.max_source_positions)
    except (AttributeError, TypeError):
        return None
    return _noise(1, 4000) if name == "input_values" else None


def _ids(model: nn.Module, length: int) -> Tensor:
    """Two sequences of different tokens, none of them special but the last, the end of the text."""
    config = getattr(model, "config", None)
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    vocabulary = getattr(config, "vocab_size", None) or min(sizes, default=2)
    named = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "decoder_start")]
    special = {i for each in named for i in (each if isinstance(each, list | tuple) else [each])}
    usable = [i for i in range(min(int(vocabulary), 1000)) if i not in special] or [0]
    places = torch.arange(2 * length).mul_(7).remainder_(len(usable))
    ids = torch.tensor(usable)[places].view(2, length)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < int(vocabulary):
        ids[:, -1] = end
    return ids


def _rows(model: nn.Module, _name: str) -> Tensor | None:
    """Numbers for a model that begins with a projection."""
    first = next((module for module in model.modules() if isinstance(module, PROJECTIONS)), None)
    return None if first is None else _noise(2, TOKENS, d_in(first))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


def _ramp(like: Tensor) -> Tensor:
    return torch.arange(like.numel(), device=like.device, dtype=torch.float64).view(like.shape)


def _tensors(answer: object) -> Iterator[Tensor]:
    """The tensors of real numbers in what a model returns."""
    if isinstance(answer, Tensor):
        if answer.is_floating_point():
            yield answer
    elif isinstance(answer, Mapping | tuple | list):
        for each in answer.values() if isinstance(answer, Mapping) else answer:
            yield from _tensors(each)
