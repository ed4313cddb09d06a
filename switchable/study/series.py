"""Where the models of a study are, and how each is loaded as a converted model.

    a run of ours      its snapshots and checkpoints; experts, routers and the neurons' order are stored with them
    other checkpoints  Hugging Face folders in the order of the steps in their names; experts are found on the fly:
                       neurons grouped by weights, each layer starting from the grouping of the checkpoint before,
                       and the router of the paper's authors (the mean of an expert's neurons). Files stay as they are.

What cannot be read is left out with the reason (`Skipped`), so that the rest can be shown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from switchable.data.tokenizers import load_tokenizer
from switchable.errors import InputError, divisors_near
from switchable.ffn.agreement import families_of
from switchable.ffn.convert import convert, layers_of
from switchable.ffn.families import find_ffns
from switchable.ffn.ssd import facts_of
from switchable.settings import SwitchConfig
from switchable.store.experts import descriptions
from switchable.store.load import load
from switchable.store.pretrained import load_pretrained
from switchable.store.rundir import RunDir, steps_in
from switchable.structure.features import weight_features
from switchable.structure.groups import cluster_layers
from switchable.switching.switch import group_anew

UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, EOFError, ImportError)
"""What libraries raise for a file that is cut off, missing or not what its name says."""


class Skipped(Exception):
    """A checkpoint that cannot be studied; the message says which and why."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to study."""

    path: Path
    step: int
    """Optimizer steps done; where the name does not tell, its place in the series."""

    @property
    def is_ours(self) -> bool:
        """Whether it was written by this package, with experts and routers."""
        return bool(descriptions(self.path))


def run_sources(run: RunDir) -> list[Source]:
    """Return the checkpoints that a run still has, in order of their steps."""
    found = steps_in(run.checkpoints) | steps_in(run.snapshots)
    return [Source(found[step], step) for step in sorted(found)]


def listed_sources(patterns: Sequence[str]) -> list[Source]:
    """Return the checkpoints of a list of folders or patterns such as `runs/x/step*`, in order of their steps.

    Raises:
        InputError: nothing there, or folders without a model.
    """
    folders: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        root = Path(path.anchor or ".")
        matched = [path] if path.exists() else sorted(root.glob(str(path.relative_to(path.anchor))))
        if not matched:
            raise InputError(
                f"no such folder: {pattern!r}; give folders of checkpoints, e.g. --checkpoints out/step*"
            )
        folders += matched
    models = [f for f in folders if (f / "config.json").is_file()]
    if not models:
        raise InputError(
            f"none of {', '.join(patterns)} is a folder with a model (config.json); give folders of checkpoints in "
            "Hugging Face form"
        )
    numbers = [re.findall(r"\d+", f.name) for f in models]
    steps = [int(n[-1]) for n in numbers] if all(numbers) else range(len(models))
    return sorted(map(Source, models, steps), key=lambda source: source.step)


class Loader:
    """Loads the models of a series one after another, converted, on one device.

    `num_experts` is E for models without experts; None: the divisor of F nearest to 32. `experts_per_token` is K; None:
    the model's own, or 3/16 of the experts.
    """

    def __init__(
        self, num_experts: int | None, experts_per_token: int | None, device: torch.device, progress: bool
    ) -> None:
        self.num_experts, self.experts_per_token, self.device = num_experts, experts_per_token, device
        self._progress = progress
        self._labels: list[Tensor] | None = None
        self._shape: list[tuple[str, int, int, int]] | None = None

    def load(self, source: Source) -> PreTrainedModel:
        """Return the model of a checkpoint.

        Raises:
            Skipped: it cannot be read, or does not have the shape of the first one.
        """
        try:
            model = self._ours(source) if source.is_ours else self._other(source)
        except InputError as error:
            raise Skipped(str(error)) from None
        except UNREADABLE as error:
            first_line = str(error).strip().partition("\n")[0] or type(error).__name__
            raise Skipped(f"{source.path} cannot be read ({first_line})") from None
        model.config.use_cache = False
        self._check_shape(source, model)
        return model.eval().to(self.device)

    def _ours(self, source: Source) -> PreTrainedModel:
        model, _ = load(source.path)
        if self.experts_per_token is not None:
            for layer in layers_of(model):
                layer.ssd.set_experts_per_token(self.experts_per_token)
        return model

    def _other(self, source: Source) -> PreTrainedModel:
        model = load_pretrained(source.path).float()
        family = families_of(model)[0][0]
        name, ffn = find_ffns(model, family)[0]
        *_, d_ff = facts_of(ffn, family, name)
        experts = self.num_experts or max(divisors_near(d_ff, 32), key=lambda d: (-abs(d - 32), d))
        per_token = self.experts_per_token or max(1, round(experts * 3 / 16))
        convert(model, SwitchConfig(num_experts=experts, experts_per_token=per_token))
        layers = layers_of(model)
        rows = [weight_features(layer.ssd.reads_FD.detach()) for layer in layers]
        before = self._labels or []
        fits = [len(labels) for labels in before] == [len(rows_FD) for rows_FD in rows]
        self._labels = cluster_layers(rows, experts, warm=before if fits else None, progress=self._progress)
        group_anew(layers, self._labels)
        return model

    def _check_shape(self, source: Source, model: PreTrainedModel) -> None:
        ssds = [layer.ssd for layer in layers_of(model)]
        shape = [(ssd.name, ssd.d_model, ssd.d_ff, ssd.num_experts) for ssd in ssds]
        self._shape = first = self._shape or shape
        if len(shape) != len(first):
            raise Skipped(f"{source.path} has {len(shape)} FFNs, the first checkpoint {len(first)}")
        for (name, *is_), (other, *was) in zip(shape, first, strict=True):
            if (name, is_) != (other, was):
                raise Skipped(
                    f"{source.path} is of another shape: {name} has d_model={is_[0]}, d_ff={is_[1]}, {is_[2]} experts; "
                    f"in the first checkpoint {other} has {was[0]}, {was[1]}, {was[2]}"
                )


def order_is_known(source: Source) -> bool:
    """Whether the checkpoint tells which neuron is which (others than ours never move them)."""
    try:
        return all("neuron_ids" in layer for layer in descriptions(source.path).values())
    except InputError:
        return False


def find_tokenizer(given: str | None, sources: Sequence[Source]) -> PreTrainedTokenizerBase:
    """Return the tokenizer given, or the one that lies with the checkpoints.

    Raises:
        InputError: there is none.
    """
    if given is not None:
        return load_tokenizer(given)
    last = sources[-1].path
    for place in (last, last.parent, last.parent.parent / "tokenizer"):
        if (place / "tokenizer_config.json").is_file() or (place / "tokenizer.json").is_file():
            return load_tokenizer(place)
    raise InputError(f"{last} holds no tokenizer; name its folder with --tokenizer")
