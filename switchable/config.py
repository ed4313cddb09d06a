"""What a run is made of: frozen dataclasses whose fields carry their unit, filled from YAML and flags.

    recipe and defaults  <  YAML file (one section per dataclass)  <  command-line flags

Field names are unique over all sections, so a flag needs no prefix: `model.d_model` is `--d-model`. An unknown key
is an error that names the nearest known one. Every class refuses wrong values in its constructor.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from switchable import options
from switchable.data.config import DataConfig, ObjectiveConfig
from switchable.data.tokenizers import check_vocab_size
from switchable.errors import InputError, divisors_near, nearest
from switchable.gone import refuse_gone, upgraded
from switchable.options import build
from switchable.recipes import AUTO, LEAST_NEURONS
from switchable.sections import BUILDABLE, ModelConfig, TrainConfig, check_memory, d_ff
from switchable.settings import SwitchConfig, settled


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run. Saved as `config.yaml` in the run's folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    switch: SwitchConfig = field(default_factory=SwitchConfig)

    def __post_init__(self) -> None:
        options.check(self)
        train, switch = self.train, self.switch
        if train.precision != "float32":
            # Here: the settings of a run are read and checked before torch is loaded.
            from switchable.choices import chosen

            train, switch = chosen(self.model, train, switch)
        object.__setattr__(self, "train", train)
        object.__setattr__(self, "switch", settled_for(switch, self.model, train))


def settled_for(switch: SwitchConfig, model: ModelConfig, train: TrainConfig) -> SwitchConfig:
    """Return the settings of switching, each with its value, for a model and how it is trained."""
    least = LEAST_NEURONS
    if train.precision != "float32":
        # Here: the settings of a run are read and checked before torch is loaded.
        from switchable.choices import least_neurons

        least = least_neurons(train)
    return settled(switch, d_ff(model), model.activation, least)


def check(config: RunConfig) -> None:
    """Raise InputError for settings that do not fit together, before any work is done."""
    model, train, experts = config.model, config.train, config.switch.num_experts
    if d_ff(model) % experts:
        allowed = ", ".join(map(str, divisors_near(d_ff(model), experts)))
        raise InputError(f"num_experts={experts} does not divide d_ff={d_ff(model)}; use one of {allowed}")
    if model.max_positions is not None and model.max_positions < train.sequence_length:
        raise InputError(
            f"sequence_length={train.sequence_length} is longer than the model's max_positions={model.max_positions}; "
            "shorten the sequences or give the model more positions"
        )
    if config.objective.whole_words and objective_of(config) != "masked":
        raise InputError(f"whole_words is for masked models, not for family {model.family}; leave it out")
    if config.data.tokenizer is None:
        check_vocab_size(config.data.vocab_size, objective_of(config))


def check_trainable(config: RunConfig) -> None:
    """Refuse what `check` does, and a model that does not fit into this machine (which `plan` is there to work out)."""
    check(config)
    check_memory(config.model, config.data.vocab_size, config.train.sequence_length)


def objective_of(config: RunConfig) -> str:
    """Return what the model learns: `"causal"`, `"masked"` or `"span"`."""
    return BUILDABLE[config.model.family].objective


def sections() -> dict[str, type]:
    """Return the sections of a run's configuration: YAML key -> dataclass."""
    return typing.get_type_hints(RunConfig)


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the configuration as plain nested dicts, lists and scalars (for YAML and JSON)."""
    plain = dataclasses.asdict(config)
    return {
        section: {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        for section, fields in plain.items()
    }


def from_dict(given: dict[str, Any], where: str = "the configuration") -> RunConfig:
    """Build a configuration from nested dicts; missing keys keep their defaults, or are the recipe's.

    Raises InputError for an unknown section or key (the nearest known one is named), or a value that is refused.
    """
    _check_sections(given, where)
    known = sections()
    return RunConfig(
        **{name: _build(known[name], values, f"{where}, section {name!r}") for name, values in given.items()}
    )


def _check_sections(given: dict[str, Any], where: str) -> None:
    known = sections()
    for section, values in given.items():
        if section not in known:
            raise InputError(
                f"{where}: unknown section {section!r}; allowed: {', '.join(known)}{nearest(str(section), known)}"
            )
        if not isinstance(values, dict):
            raise InputError(f"{where}: section {section!r} must hold `key: value` lines, not {values!r}")


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            refuse_gone(str(key), where)
            like = nearest(str(key), hints)
            raise InputError(f"{where}: unknown key {key!r}{like}; allowed: {', '.join(hints)}")
    return build(cls, values, where)


def load(path: Path | None, flags: dict[str, Any], choose: bool = True) -> RunConfig:
    """Read a YAML file (or none) and lay the flags (field name -> value) over it.

    Recipe and precision are `auto` if not given. `choose` says whether to look what precision `auto` is on this
    machine; else it is float32. Raises InputError if the file is missing or not YAML, for an unknown key, or a value
    that is refused.
    """
    where = "the flags" if path is None else str(path)
    given = {} if path is None else read_yaml(path)
    _check_sections(given, where)
    for section, cls in sections().items():
        for f in dataclasses.fields(cls):
            if f.name in flags:
                given.setdefault(section, {})[f.name] = flags[f.name]
    switch = given["switch"] = {"recipe": AUTO} | given.get("switch", {})
    train = given["train"] = {"precision": AUTO} | given.get("train", {})
    if train["precision"] == AUTO:
        train = train | {"precision": "float32"}
    # What is wrong is refused before torch is loaded to see what the machine can do.
    named = from_dict(given | {"switch": {"active_below": 0.0} | switch, "train": train}, where)
    if not choose:
        return named
    check(named)
    return from_dict(given, where)


def read_stored(path: Path) -> RunConfig:
    """Read a run's `config.yaml`, of older versions too; InputError: not readable, or it asks for what is gone."""
    given = read_yaml(path)
    _check_sections(given, str(path))
    return from_dict(upgraded(given, str(path)), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of sections, none if it is empty; InputError: missing, not UTF-8, not YAML, or not a mapping."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"config file {path} does not exist; give the path of a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(f"config file {path} is not readable YAML: {why}") from None
    except OSError as error:
        raise InputError(f"config file {path} cannot be read: {error.strerror}") from None
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise InputError(f"{path} must hold sections ({', '.join(sections())}), not {type(given).__name__}")
    return given


def changed(old: RunConfig, new: RunConfig) -> list[str]:
    """Return one `section.key: old -> new` line per field in which two configurations differ."""
    a, b = to_dict(old), to_dict(new)
    return [f"{s}.{k}: {a[s][k]!r} -> {b[s][k]!r}" for s in a for k in a[s] if a[s][k] != b[s][k]]
