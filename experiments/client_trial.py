"""One model class that `families.py` need not know: is it converted by its structure, and is it the same model then?

    works     converted; dense mode a no-op (logits, gradients, and a training step's logits with their dropout); all
              experts on equal to dense, gradients too; 40 steps with switching and a regrouping, each regrouping
              leaving the function as it was; a dense export that plain transformers opens, with the same logits
    refused   InputError, and not a bit of the model has changed
    WRONG     anything else

Every ReLU over neurons that the plain model calls must lie in a switchable FFN, or in a part that the report says was
left alone: none is left out in silence.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from experiments.client_build import NEURONS, WIDTH, CannotBuildError, build, inputs, seed
from experiments.client_see import Seen, gradients_apart, output, relative, see
from experiments.client_table import LEFT
from switchable import ConversionReport, InputError, SwitchConfig, convert, in_mode
from switchable.ffn.convert import layers_of
from switchable.ffn.families import d_in
from switchable.ffn.layer import SwitchableFFN
from switchable.store.pretrained import save_plain
from switchable.switching.controller import Controller

STEPS, MEASURED = 40, 5
CONFIG = SwitchConfig(
    num_experts=8,
    experts_per_token=3,
    recipe="early",
    sparse_steps=3,
    min_dense_fraction=0.25,
    final_dense_fraction=0.1,
    monitor_every=MEASURED,
    monitor_growth=1.0,
    mass_target=None,
    max_activation_ratio=1.0,
    min_mass_caught=0.0,
    stability_threshold=0.0,
    activation_l1=0.0,
    router_token_fraction=0.5,
)
NO_ROW = "not in the table"
NO_FFN = ("Mamba", "FalconMamba")
"""State-space blocks, whose ReLU is over channels of a convolution."""
ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "sigmoid", "erf")
"""The last three stand for what is written out."""
SAME, CLOSE = 1e-6, 1e-5
"""Relative to the norm: the same arithmetic, and another order of summing."""


@dataclass
class Verdict:
    """What became of one class."""

    model: str
    verdict: str
    why: str = ""
    ffns: int = 0
    form: str = ""
    """Gated or not, in a module of its own or among a layer's parts."""
    figures: dict[str, float] = field(default_factory=dict)


class WrongError(Exception):
    """A converted model is not the model it was; says in what."""


class Relus(TorchFunctionMode):
    """Counts ReLUs over neurons, and notes what other activations there are over as many."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.others: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a call and do it."""
        name = getattr(func, "__name__", "").rstrip("_")
        if name in ACTIVATIONS and _over_neurons(args[0]):
            if name == "relu":
                self.calls += 1
            else:
                self.others.add(name)
        return func(*args, **(kwargs or {}))


def _over_neurons(x: Tensor) -> bool:
    if x.ndim > 2 and x.shape[1] == WIDTH:  # a convolution's channels, and many positions
        return False
    return x.shape[-1] >= NEURONS // 2 or NEURONS in x.shape[1:]  # neurons may come before positions


def attempt(name: str, kind: Any) -> Verdict:
    """Build a class tiny, convert it without a row, and try everything."""
    try:
        model, plain, relus = _built(kind)
        batch = inputs(model)
        was, before = output(model, batch), {n: t.clone() for n, t in model.state_dict().items()}
        reference = see(plain, batch)
    except Exception as error:  # noqa: BLE001 - whatever transformers says of a config that does not suit it
        return Verdict(name, "cannot build", _one_line(error))
    if not relus.calls or name.startswith(NO_FFN):
        others = f"its activation is {' and '.join(sorted(relus.others))}"
        return Verdict(name, "no ReLU", "it has no FFN" if name.startswith(NO_FFN) else others)
    kinds = [type(m) for m in model.modules()]
    mixture = any("expert" in n for n, _ in model.named_modules())
    try:
        report = converted(model, batch)
    except InputError as error:
        same = [type(m) for m in model.modules()] == kinds and _same_weights(model.state_dict(), before)
        if not same or not torch.equal(output(model, batch), was):
            return Verdict(name, "WRONG", f"refused, but changed: {_one_line(error)}")
        return Verdict(name, "mixture" if mixture else "refused", _one_line(error))
    found = layers_of(model)
    verdict = Verdict(name, "works", "", len(found), form(found[0]))
    try:
        verdict.figures = tried(model, plain, batch, reference, relus.calls - _told(report, model, batch))
    except WrongError as error:
        verdict.verdict, verdict.why = "WRONG", str(error)
    if verdict.verdict == "works" and report.left_alone:
        verdict.why = f"{LEFT}: {'; '.join(f'{n}, {why}' for n, why in report.left_alone.items())}"
    if verdict.figures.pop("in float64", 0):
        verdict.why = "all experts in float64: it amplifies the rounding of float32"
    return verdict


def _built(kind: Any) -> tuple[nn.Module, nn.Module, Relus]:
    """Return a model twice, and which activations it has; its outputs must not differ from call to call.

    Raises:
        CannotBuildError: they do.
    """
    model, plain = build(kind), build(kind)
    batch = inputs(model)
    with Relus() as relus:
        first = output(model, batch)
    if not first.isfinite().all() or not torch.equal(first, output(plain, batch)):
        raise CannotBuildError("its output is not finite, or another at every call")
    return model, plain, relus


def converted(model: Any, batch: Mapping[str, Any]) -> ConversionReport:
    """Convert a model as one whose type has no row; with inputs where `convert` asks for some."""
    own = model.config.model_type
    model.config.model_type = NO_ROW
    try:
        return convert(model, CONFIG)
    except InputError as error:
        if "example_inputs" not in str(error):
            raise
        return convert(model, CONFIG, example_inputs=batch)
    finally:
        model.config.model_type = own


def _told(report: ConversionReport, model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Return how many ReLUs over neurons are in parts that a report says were left alone."""
    named = [m for n, m in model.named_modules() if any(fnmatch(n, each) for each in report.left_alone)]
    return _calls([down for down in named if d_in(down) >= NEURONS // 2], model, batch)


def form(layer: SwitchableFFN) -> str:
    """Say in two words what kind of FFN a layer is."""
    family = layer.ssd.settings.family
    return ("gated" if family.gate else "plain") + (", in the layer" if family.in_layer else "")


def tried(model: Any, plain: Any, batch: Mapping[str, Any], reference: Seen, relus: int) -> dict[str, float]:
    """Try everything on a converted model; return how far it is from the plain one.

    Raises:
        WrongError: too far.
    """
    figures: dict[str, float] = {}

    def check(what: str, apart: float, most: float) -> None:
        figures[what] = max(apart, figures.get(what, 0.0))
        if not apart <= most:
            raise WrongError(f"{what}: {apart:.1e} apart, allowed {most:.0e}")

    calls = _calls(layers_of(model), model, batch)
    if (
        calls < relus
    ):  # more: where a sequence is as long as the model is wide, a ReLU over neurons is not counted
        raise WrongError(f"{calls} of {relus} FFNs are switchable, and nothing said so")
    dense = see(model, batch)
    check("dense", relative(dense.out, reference.out), SAME)
    check("training, dropout on", relative(dense.trained, reference.trained), SAME)
    check("gradients, dense", gradients_apart(dense, reference), SAME)
    apart = _all_experts(model, batch, dense)
    if max(apart) > CLOSE:  # a model that amplifies rounding has less of it in float64
        apart = _all_experts(model.double(), batch)
        model.float()
        figures["in float64"] = 1.0
    check("all experts", apart[0], CLOSE)
    check("gradients, all experts", apart[1], CLOSE)
    _train(model, batch, check)
    with tempfile.TemporaryDirectory() as folder:
        save_plain(Path(folder), model)
        again, told = type(plain).from_pretrained(folder, output_loading_info=True, local_files_only=True)
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in told[kind]]
    if wrong or layers_of(again):
        raise WrongError(f"the dense export does not fit plain transformers: {wrong[:3]}")
    with in_mode(model, "dense"):
        check("dense export", relative(output(again.eval(), batch), output(model.eval(), batch)), SAME)
    return figures


def _all_experts(model: Any, batch: Mapping[str, Any], dense: Seen | None = None) -> tuple[float, float]:
    """Return how far sparse mode with all experts is from dense mode, and its gradients."""
    dtype = next(model.parameters()).dtype
    here = {
        n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in batch.items()
    }
    dense = dense or see(model, here)
    with in_mode(model, "sparse", CONFIG.num_experts):
        sparse = see(model, here)
    return relative(sparse.out, dense.out), gradients_apart(sparse, dense)


def _train(model: Any, batch: Mapping[str, Any], check: Any) -> None:
    """Train for 40 steps, dense and sparse, with a regrouping that must leave the function as it is.

    Raises:
        WrongError: a loss is not finite, no step was sparse, or nothing was regrouped.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller = Controller(model, batch, total_steps=STEPS)
    modes = []
    for step in range(STEPS):
        modes.append(controller.mode)
        seed(step)
        loss = _loss(model.train()(**batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            raise WrongError(f"loss {loss.item()} at step {step}, {modes[-1]}")
        if not controller.measures_next:
            controller.step(optimizer)
            continue
        before = _dense_output(model, batch)
        controller.step(optimizer)
        check("regrouping", relative(_dense_output(model, batch), before), CLOSE)
    if controller.regroupings < len(layers_of(model)) or not 0 < modes.count("sparse") < STEPS:
        raise WrongError(f"{controller.regroupings} regroupings, {modes.count('sparse')} sparse steps")


def _dense_output(model: Any, batch: Mapping[str, Any]) -> Tensor:
    with in_mode(model, "dense"):
        return output(model.eval(), batch)


def _loss(out: Any) -> Tensor:
    loss = out.get("loss")
    return (out["logits"] if "logits" in out else out[0]).square().mean() if loss is None else loss


def _calls(modules: Sequence[nn.Module], model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Return how often some modules are called in one pass."""
    calls: list[int] = []
    hooks = [module.register_forward_hook(lambda *_: calls.append(1)) for module in modules]
    output(model, batch)
    for hook in hooks:
        hook.remove()
    return len(calls)


def _same_weights(state: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return state.keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in state.items())


def _one_line(error: Exception) -> str:
    return f"{'' if isinstance(error, InputError) else type(error).__name__ + ': '}{' '.join(str(error).split())}"[
        :300
    ]
