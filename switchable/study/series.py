"""Where the models of a study are, and how each is loaded as a converted model.

    a run of ours      its snapshots and checkpoints; experts, routers and the neurons' order are stored with them
    other checkpoints  Hugging Face folders in the order of the steps in their names; experts are found on the fly:
                       neurons grouped by weights, each layer starting from the grouping of the checkpoint before,
                       and the router of the paper's authors (the mean of an expert's neurons). Files stay as they are.

What cannot be read is an InputError with the reason, so that the study can leave it out and show the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
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
from switchable.study.result import LayerShape
from switchable.switching.switch import group_anew

UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, EOFError, ImportError)
"""What libraries raise for a file that is cut off, missing or not what its name says."""


def run_sources(run: RunDir) -> dict[int, Path]:
    """Return the checkpoints that a run still has by their steps, ascending."""
    found = steps_in(run.checkpoints) | steps_in(run.snapshots)
    return dict(sorted(found.items()))


def listed_sources(patterns: Sequence[str]) -> dict[int, Path]:
    """Return the checkpoints of a list of folders or patterns such as `runs/x/step*` by their steps, ascending.

    Where the names do not tell the steps, or the same one twice, it is their places in the list. Raises InputError
    where there is nothing, and for folders without a model.
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
    if not (models := [f for f in folders if (f / "config.json").is_file()]):
        raise InputError(
            f"none of {', '.join(patterns)} is a folder with a model (config.json); give folders of checkpoints in "
            "Hugging Face form"
        )
    numbers = [re.findall(r"\d+", f.name) for f in models]
    steps = [int(n[-1]) for n in numbers if n]
    if len(set(steps)) < len(models):
        steps = list(range(len(models)))
    return dict(sorted(zip(steps, models, strict=True)))


class Loader:
    """Loads the models of a series one after another, converted, on one device.

    `num_experts` is E for models without experts; None: the divisor of F nearest to 32. `experts_per_token` is K; None:
    the model's own, or 3/16 of the experts.
    """

    def __init__(
        self, num_experts: int | None, experts_per_token: int | None, device: torch.device, progress: bool
    ) -> None:
        self.num_experts, self.experts_per_token, self.device = num_experts, experts_per_token, device
        self.shape: list[LayerShape] = []  # of the first model
        self.orderless: list[Path] = []  # checkpoints that do not tell which neuron is which
        self._progress = progress
        self._labels: list[Tensor] | None = None

    def load(self, path: Path) -> PreTrainedModel:
        """Return a checkpoint's model; InputError if it cannot be read, or is not of the first one's shape."""
        try:
            described = descriptions(path)
            model = self._ours(path) if described else self._other(path)
        except InputError:
            raise
        except UNREADABLE as error:
            first_line = str(error).strip().partition("\n")[0] or type(error).__name__
            raise InputError(f"{path} cannot be read ({first_line})") from None
        model.config.use_cache = False
        self._check_shape(path, model)
        if not all("neuron_ids" in layer for layer in described.values()):
            self.orderless.append(path)
        return model.eval().to(self.device)

    def _ours(self, path: Path) -> PreTrainedModel:
        model, _ = load(path)
        if self.experts_per_token is not None:
            for layer in layers_of(model):
                layer.ssd.set_experts_per_token(self.experts_per_token)
        return model

    def _other(self, path: Path) -> PreTrainedModel:
        model = load_pretrained(path).float()
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

    def _check_shape(self, path: Path, model: PreTrainedModel) -> None:
        ssds = [layer.ssd for layer in layers_of(model)]
        shape = [
            LayerShape(ssd.name, ssd.d_model, ssd.d_ff, ssd.num_experts, ssd.settings.activation)
            for ssd in ssds
        ]
        self.shape = self.shape or shape
        if len(shape) != len(self.shape):
            raise InputError(f"{path} has {len(shape)} FFNs, the first checkpoint {len(self.shape)}")
        for own, first in zip(shape, self.shape, strict=True):
            if replace(own, activation=first.activation) != first:
                raise InputError(
                    f"{path} is of another shape: {own.name} has d_model={own.d_model}, d_ff={own.d_ff}, "
                    f"{own.num_experts} experts; in the first checkpoint {first.name} has {first.d_model}, "
                    f"{first.d_ff}, {first.num_experts}"
                )


def find_tokenizer(given: str | None, last: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer given, or the one that lies with the last checkpoint; InputError if there is none."""
    if given is not None:
        return load_tokenizer(given)
    for place in (last, last.parent, last.parent.parent / "tokenizer"):
        if (place / "tokenizer_config.json").is_file() or (place / "tokenizer.json").is_file():
            return load_tokenizer(place)
    raise InputError(f"{last} holds no tokenizer; name its folder with --tokenizer")
