"""convert(model): the same model, its FFNs made switchable; set_mode(model): how they multiply from now on.

`convert` changes no logits in dense mode and says how many FFNs it changed, and what like an FFN it left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from switchable.compute.activations import has_zeros
from switchable.compute.choose import check_backend
from switchable.errors import InputError
from switchable.ffn.agreement import check_same_function, families_of, put_in_place
from switchable.ffn.attached import LossScale
from switchable.ffn.families import Family, find_ffns
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.layout import of_several_names, store_by_neuron
from switchable.ffn.plain import check_movable, check_plain, own_forwards
from switchable.ffn.recording import kept
from switchable.ffn.ssd import FFNSettings, facts_of, settings_of
from switchable.ffn.trial import Inputs
from switchable.finite import check_finite
from switchable.options import checked
from switchable.settings import SwitchConfig, settled

MODES = ("mode", "experts_per_token", "mass", "router_learns", "multiplies_active", "estimates")
"""What decides how an FFN is multiplied."""
PerLayer = int | Sequence[int | None] | None
NOT_SWITCHABLE = (
    "the model has no switchable FFNs; convert it first: convert(model), or `switchable convert` for a folder"
)


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did."""

    converted: int
    """FFNs made switchable."""
    names: tuple[str, ...]
    """Their names in the model."""
    num_experts: int
    """E, the same in every layer."""
    d_ff: int
    """Neurons of the first FFN."""
    neuron_major: bool = False
    """Whether weights are stored neuron by neuron, one projection of each FFN not contiguous."""
    left_alone: Mapping[str, str] = field(default_factory=dict)
    """Why other parts that look like an FFN are not, by their output projections' names (* for a layer's number)."""
    not_sparse: tuple[str, ...] = ()
    """Activations of the FFNs that are zero almost nowhere, by their names in transformers' `ACT2FN`."""

    @property
    def ffns(self) -> str:
        """How many FFNs are switchable, and their experts, in words."""
        experts = f"{self.num_experts} experts of {self.d_ff // self.num_experts} neurons"
        return f"{self.converted} of {len(self.names)} FFNs are switchable: {experts}"

    def __str__(self) -> str:
        layout = "; stored neuron by neuron (for contiguous parameters: convert(..., neuron_major=False))"
        others = "".join(f"; left alone: {name}, {why}" for name, why in self.left_alone.items())
        never = f"; {' and '.join(self.not_sparse)}: zero almost nowhere, a sparse mode wants ReLU"
        return f"{self.ffns}{never * bool(self.not_sparse)}{layout * self.neuron_major}{others}"


def convert(
    model: nn.Module,
    config: SwitchConfig | None = None,
    family: Family | Sequence[Family] | None = None,
    *,
    example_inputs: Inputs | None = None,
    trusted: bool = False,
    neuron_major: bool | None = None,
    layer_type: type[SwitchableFFN] = SwitchableFFN,
) -> ConversionReport:
    """Make every FFN of a transformers model switchable, in place; the model stays in dense mode.

    Args:
        model: a transformers model, on any device.
        config: experts, router and schedule; default `SwitchConfig()`.
        family: where the FFNs are; default: the table's row for a model of transformers, or what `finder.py` finds.
        example_inputs: a batch for a model that cannot be given one from what it says of itself: its inputs by name,
            in order, or the only one. On it the FFNs are found, and the model is compared before and after.
        trusted: leave out that comparison; the family is what an earlier `convert` of the model had.
        neuron_major: transpose the storage (not the shape) of weights whose neurons are columns, so that each
            neuron's weights are contiguous (`layout.py`). None: where that is faster, on a CPU in sparse mode. False
            keeps all memory as it is, for what wants contiguous parameters (`fully_shard`, LBFGS, `save_file`).
        layer_type: a subclass of `SwitchableFFN` to put in place instead.

    Raises:
        InputError: a wrong type, a weight that is not finite, no FFNs or not all found, the model computes
            something else with them, it is converted already, or E does not divide F. The model is unchanged then.
    """
    config = checked("config", config, SwitchConfig | None) or SwitchConfig()
    if before := layers_of(checked("model", model, nn.Module)):
        raise InputError(f"the model is converted already ({len(before)} switchable FFNs); convert it once")
    if taken := [name for name, _ in model.named_parameters() if is_router_parameter(name)]:
        raise InputError(f"the model has routers of its own ({taken[0]}): it is a mixture of experts already")
    check_backend(config.backend)
    check_finite(model, "the model", "convert one from before its training diverged")
    families, trial, others = families_of(model, family, example_inputs, trusted)
    found = _in_order(model, [(*each, family) for family in families for each in find_ffns(model, family)])
    name, ffn, first_family = found[0]
    activation, _, d_ff = facts_of(ffn, first_family, name)
    config = settled(config, d_ff, activation)
    built = [
        (name, ffn, _switchable(ffn, settings_of(ffn, each, name, config), layer_type))
        for name, ffn, each in found
    ]
    put_in_place(model, built, trial)
    layers = [layer for _, _, layer in built]
    scale, first, shared = LossScale(), layers[0].ssd, of_several_names(model)
    if neuron_major is None:
        neuron_major = first.reads_FD.is_cpu and not config.never_sparse
    for layer in layers:
        layer.ssd.loss_scale = scale
        if neuron_major:
            store_by_neuron(layer, shared)
    scale.watch(model)
    names = tuple(name for name, _, _ in found)
    dense = tuple(sorted(a for a in {layer.ssd.settings.activation for layer in layers} if not has_zeros(a)))
    return ConversionReport(len(built), names, config.num_experts, first.d_ff, neuron_major, others, dense)


def _in_order(
    model: nn.Module, found: Sequence[tuple[str, nn.Module, Family]]
) -> list[tuple[str, nn.Module, Family]]:
    """Return FFNs of several families in the model's order; raise InputError if two families mean one module."""
    by_name = {name: (name, ffn, family) for name, ffn, family in found}
    if len(by_name) != len(found):
        raise InputError("two of the families given mean the same FFN; give each FFN one")
    return [by_name[name] for name, _ in model.named_modules() if name in by_name]


def _switchable(ffn: nn.Module, settings: FFNSettings, layer_type: type[SwitchableFFN]) -> SwitchableFFN:
    layer = layer_type(ffn, settings)
    layer.ssd.own_forwards = own_forwards(layer.ssd)
    if not settings.config.never_sparse:
        check_movable(layer.ssd)
    if not settings.family.in_layer:
        check_same_function(ffn, layer)
    return layer.train(ffn.training)


def layers_of(model: nn.Module) -> list[SwitchableFFN]:
    """Return the switchable FFNs of a model in its own order; empty if it is not converted."""
    return [module for module in model.modules() if isinstance(module, SwitchableFFN)]


def set_mode(
    model: nn.Module, mode: str, experts_per_token: PerLayer = None, mass: float | None = None
) -> None:
    """Set how the FFNs multiply from now on: `"dense"` (all neurons) or `"sparse"` (K experts per token).

    Layers that do not take part in sparse mode (`layer.ssd.takes_part`, set by the schedule) stay dense.

    Args:
        model: a converted model; dense mode alone can be had of any other too.
        mode: `"dense"` or `"sparse"`.
        experts_per_token: K, 1 to E, one for all layers or one for each; None keeps each layer's own.
        mass: of the K the fewest whose shares (softmax of the router's scores) add up to it, 1: all; None: as before.

    Raises:
        InputError: unknown mode, impossible K or mass, the model is not converted, or it has no sparse mode (no layer
            takes part, or something hangs on a projection that sparse mode would pass by); nothing has been changed.
    """
    found = layers_of(checked("model", model, nn.Module))
    mass = checked("mass", mass, float | None, above=0, most=1, usual="0.9")
    if not found and (mode != "dense" or experts_per_token is not None):
        raise InputError(f"mode={mode!r}: {NOT_SWITCHABLE}")
    if mode not in ("dense", "sparse"):
        raise InputError(f"mode={mode!r} is not known; use 'dense' or 'sparse'")
    given = experts_per_token
    each = given if isinstance(given, Sequence) else [given] * len(found)
    if len(each) != len(found):
        raise InputError(
            f"experts_per_token has {len(each)} values for {len(found)} FFNs; give one each or one for all"
        )
    ks = [layer.ssd.experts_per_token if k is None else k for layer, k in zip(found, each, strict=True)]
    ks = [layer.ssd.checked_experts_per_token(k) for layer, k in zip(found, ks, strict=True)]
    if mode == "sparse":
        check_sparse(model)
    for layer, k in zip(found, ks, strict=True):
        layer.ssd.experts_per_token = k
        if mass is not None:
            layer.ssd.mass = mass
        layer.ssd.mode = mode if layer.ssd.takes_part else "dense"


def check_sparse(model: nn.Module) -> None:
    """Raise InputError for a model without a sparse mode, or where that with all experts is not the dense mode."""
    if not (taking_part := [layer.ssd for layer in layers_of(model) if layer.ssd.takes_part]):
        raise InputError(f"the model has no sparse mode: {why_dense(model)}; use dense mode")
    for ssd in taking_part:
        check_plain(ssd)


def why_dense(model: nn.Module) -> str | None:
    """Say which FFNs sparse mode leaves dense, and why; None if there are none."""
    if not (layers := layers_of(model)):
        return NOT_SWITCHABLE
    names: dict[str, list[str]] = {}
    for ssd in (layer.ssd for layer in layers if not layer.ssd.takes_part):
        names.setdefault(ssd.why_dense or "the model's folder does not say why", []).append(ssd.name)
    reasons = "; ".join(f"{', '.join(which)}: {why}" for why, which in names.items())
    return f"{sum(map(len, names.values()))} of {len(layers)} FFNs stay dense ({reasons})" if names else None


def shown_mode(model: nn.Module, mode: str) -> str:
    """Say what a mode is in this model: K of E, for each FFN where they differ, and which FFNs stay dense, and why."""
    if mode == "dense":
        return "dense mode"
    layers = [layer.ssd for layer in layers_of(model)]
    each = [str(ssd.experts_per_token) if ssd.takes_part else "all" for ssd in layers]
    own = set(each) - {"all"}
    shown = own.pop() if len(own) == 1 else f"({', '.join(each)})"
    why = why_dense(model)
    if not any(ssd.takes_part for ssd in layers):
        return f"no sparse mode, {why}"
    few, mass = f"{shown} of {layers[0].num_experts} experts", layers[0].mass
    few = few if mass == 1 else f"up to {few}, those whose shares add up to {mass:g}"
    return f"sparse mode, K={few}" + (f"; {why}" if why else "")


@contextmanager
def in_mode(
    model: nn.Module, mode: str, experts_per_token: PerLayer = None, mass: float | None = None
) -> Iterator[None]:
    """Within the `with` block the FFNs multiply so (see `set_mode`); afterwards as before: for single calls."""
    with kept_modes(checked("model", model, nn.Module)):
        set_mode(model, mode, experts_per_token, mass)
        yield


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[list[SwitchableFFN]]:
    """Within the `with` block modes (`MODES`, and which modules train) may change; afterwards they are as before."""
    layers = layers_of(model)
    with kept((layer.ssd for layer in layers), *MODES), kept(model.modules(), "training"):
        yield layers


def is_router_parameter(name: str) -> bool:
    """Return whether a name in a state dict is of a router: what we add to a model, and what an export drops."""
    return ".router." in name
