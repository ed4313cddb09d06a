"""The sparse FFN in both precisions over the fastest dense one, training and prefill: see `ffn.py`, which runs it."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks._ffn_layer import GATED, TRAINING, Layer, Shape, dense_ffn
from benchmarks._memory import peak_bytes
from switchable import Family, SwitchConfig, convert, set_mode
from switchable.compute.choose import expert_ffn
from switchable.timing import processor, take_turns


class HalfLayer(Layer):
    """The same numbers as float32 and as bfloat16; a contender's name says which, as in `fused autocast`."""

    def __init__(self, shape: Shape, seed: int = 0):
        super().__init__(shape, seed)
        with torch.no_grad():
            for leaf in (*self.leaves().values(), self.down.weight):
                leaf.copy_(leaf.bfloat16())
            self.down_FD.copy_(self.down.weight.t())
        self.dy_TD = self.dy_TD.bfloat16().float()
        self.halves = {name: leaf.detach().bfloat16() for name, leaf in self.leaves().items()}
        self.halves["dense down"] = self.down.weight.detach().bfloat16()
        for leaf in self.halves.values():
            leaf.requires_grad_()
        self.module, whole = ffn_of(shape), switchable_of(shape)
        self.modules = {
            "float32": self.module,
            "autocast": self.module,
            "weights": deepcopy(self.module).bfloat16(),
        }
        self.wholes = {"float32": whole, "autocast": whole, "weights": deepcopy(whole).bfloat16()}
        modules = (*self.wholes.values(), *self.modules.values())
        wholes = (leaf for each in modules for leaf in each.parameters())
        self.learning = (*self.halves.values(), *wholes)

    def leaves_of(self, name: str) -> dict[str, Tensor]:
        """What a contender is given."""
        return self.halves if name.endswith("weights") else {**self.leaves(), "dense down": self.down.weight}

    def forward(self, name: str) -> Tensor:
        own, (way, precision) = self.leaves_of(name), name.split()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            if way in ("layer", "module"):
                modules = self.wholes if way == "layer" else self.modules
                y_TD: Tensor = modules[precision](own["x"][None]).squeeze(0)
                return y_TD
            if way == "dense":
                return dense_ffn(own, own["dense down"])
            return expert_ffn(self.call(own), way)

    def _zero_grad(self) -> None:
        super()._zero_grad()
        for leaf in self.learning:
            leaf.grad = None

    def train(self, name: str) -> None:
        self._zero_grad()
        y_TD = self.forward(name)
        torch.autograd.backward(y_TD, self.dy_TD.to(y_TD.dtype))

    def prefill(self, name: str) -> None:
        with torch.no_grad():
            self.forward(name)

    def set_training(self, training: bool) -> None:
        """Whether whole layers train from now on."""
        for each in (*self.wholes.values(), *self.modules.values()):
            each.train(training)

    def errors(self, name: str, true: dict[str, Tensor]) -> dict[str, float]:
        """Return a contender's relative errors in the output and all gradients."""
        own = {leaf: tensor for leaf, tensor in self.leaves_of(name).items() if leaf in true}
        y_TD = self.forward(name)
        gradients = torch.autograd.grad(y_TD, list(own.values()), self.dy_TD.to(y_TD.dtype))
        found = {"y": y_TD.detach(), **dict(zip(own, gradients, strict=True))}
        return {leaf: float((found[leaf] - wanted).norm() / wanted.norm()) for leaf, wanted in true.items()}


GATED_FAMILY = Family("LlamaMLP", "up_proj", "down_proj", "act_fn", gate="gate_proj")
FAMILY = Family(ffn="GPT2MLP", up="c_fc", down="c_proj")


def ffn_of(shape: Shape) -> nn.Sequential:
    """An FFN of transformers of this shape."""
    if shape.gated:
        llama = LlamaConfig(hidden_size=shape.D, intermediate_size=shape.F, hidden_act="relu")
        return nn.Sequential(LlamaMLP(llama))
    gpt2 = GPT2Config(n_embd=shape.D, activation_function="relu", resid_pdrop=0.0)
    return nn.Sequential(GPT2MLP(shape.F, gpt2))


def switchable_of(shape: Shape) -> nn.Module:
    """The same, converted, in sparse mode, with the settings of recipe `auto`."""
    model = ffn_of(shape)
    config = SwitchConfig("auto", num_experts=shape.E, experts_per_token=shape.K, mass_target=None)
    convert(model, config, GATED_FAMILY if shape.gated else FAMILY)
    set_mode(model, "sparse")
    return model


PRECISIONS = ("float32", "autocast", "weights")
FEW = Shape(512, 768, 3072)
WHOLE = {"train": "layer autocast", "prefill": "layer weights"}
"""How whole layers multiply in bfloat16."""


def parity_errors() -> list[str]:
    """Return one line for each contender and tensor that is worse than torch's in bfloat16."""
    return [line for gated in (False, True) for line in _parity_errors(Shape(301, 64, 256, 8, 3, gated))]


def _parity_errors(shape: Shape) -> list[str]:
    layer = HalfLayer(shape)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in layer.leaves().items()}
    y_TD = expert_ffn(layer.call(exact), "reference")
    gradients = torch.autograd.grad(y_TD, list(exact.values()), layer.dy_TD.double())
    true = {"y": y_TD.detach(), **dict(zip(exact, gradients, strict=True))}
    lines = []
    for precision in PRECISIONS[1:]:
        most, found = (layer.errors(f"{way} {precision}", true) for way in ("masked", "fused"))
        lines += [
            f"fused {precision} is off in {tensor}: relative error {error:.1e}, dense {most[tensor]:.1e} at {shape}"
            for tensor, error in found.items()
            if not error <= 1.5 * most[tensor]
        ]
    return lines


def row_of(shape: Shape, seconds: float) -> dict[str, Any]:
    """Time training and prefill in both precisions."""
    layer = HalfLayer(shape)
    names = [f"{way} {precision}" for way in ("dense", "fused") for precision in PRECISIONS]
    row: dict[str, Any] = {"shape": str(shape)}
    for job, whole in WHOLE.items():
        calls = {name: partial(getattr(layer, job), name) for name in (*names, whole)}
        layer.set_training(job == "train")
        times = take_turns(calls, seconds / 2)
        dense, ours = (
            min((n for n in names if n.startswith(way)), key=times.median) for way in ("dense", "fused")
        )
        row[job] = {
            "ms": {name: 1e3 * value for name, value in times.medians.items()},
            "best_dense": dense,
            "ours": ours,
            "over_best_dense": times.ratio(dense, ours),
            "layer_over_best_dense": times.ratio(dense, whole),
        }
        if job == "train":
            peaks = {name: peak_bytes(call, layer.forget) for name, call in calls.items()}
            row["peak_mib"] = {name: peak / 2**20 for name, peak in peaks.items()}
            # Over dense of the same kind: whether weights are of bfloat16, speed does not decide.
            shares = [peaks[f"fused {kind}"] / peaks[f"dense {kind}"] for kind in PRECISIONS[1:]]
            row["memory_share"] = max(*shares, peaks[whole] / peaks["dense autocast"])
        report(job, row)
    return row


def report(job: str, row: dict[str, Any]) -> None:
    """Print one job of a shape."""
    own = row[job]
    print(f"\n{job}: {row['shape']}")
    for name, value in own["ms"].items():
        print(f"  {name:<16}{value:>9.3f} ms {own['ms'][own['best_dense']] / value:>6.2f}x best dense")
    print(
        f"  {own['ours']}: {own['over_best_dense']:.2f}x {own['best_dense']} (within a turn); whole layer, router "
        f"included: {own['layer_over_best_dense']:.2f}x"
    )


def main(seconds: float) -> int:
    """Run everything in bfloat16; return the exit code."""
    errors = parity_errors()
    if errors:
        print("\n".join(errors), file=sys.stderr)
        return 1
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, bfloat16")
    rows = {shape.D: row_of(shape, seconds) for shape in TRAINING}
    gated, few = row_of(GATED, seconds), row_of(FEW, seconds)
    document = {
        **{f"train_over_best_dense_d{width}": row["train"]["over_best_dense"] for width, row in rows.items()},
        **{f"layer_over_best_dense_d{w}": row["train"]["layer_over_best_dense"] for w, row in rows.items()},
        "prefill_layer_over_best_dense_d768": rows[768]["prefill"]["layer_over_best_dense"],
        "prefill_over_best_dense_d768": rows[768]["prefill"]["over_best_dense"],
        "prefill_512_layer_over_best_dense_d768": few["prefill"]["layer_over_best_dense"],
        "gated_over_best_dense": gated["train"]["layer_over_best_dense"],
        "gated_experts_over_best_dense": gated["train"]["over_best_dense"],
        "gated_prefill_over_best_dense": gated["prefill"]["layer_over_best_dense"],
        "memory_share": rows[768]["memory_share"],
        "machine": {"processor": processor(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "shapes": [*rows.values(), gated, few],
    }
    print(json.dumps(document))
    return 0
