"""What a run is made of: frozen dataclasses whose fields carry their unit, filled from YAML and flags.

    defaults  <  YAML file (one section per dataclass)  <  command-line flags

Field names are unique over all sections, so a flag needs no prefix: `model.d_model` is `--d-model`. An unknown key
is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from switchable import recipes
from switchable.coercion import build, coerce
from switchable.data.config import DataConfig, ObjectiveConfig
from switchable.data.tokenizers import check_vocab_size
from switchable.errors import InputError, divisors_near, nearest
from switchable.settings import SwitchConfig


def option(default: Any, help_text: str, **metadata: Any) -> Any:
    """Declare a config field with its default and its help text (which names the unit)."""
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass(frozen=True)
class ModelConfig:
    """The model to pre-train: a transformers architecture with an FFN whose activation is sparse."""

    family: str = option("gpt2", "model type of transformers to build: gpt2, opt, llama, bert, roberta or t5")
    d_model: int = option(256, "width of the residual stream")
    d_ff: int | None = option(None, "neurons per FFN; default 4 x d_model")
    num_layers: int = option(4, "Transformer blocks")
    num_heads: int = option(4, "attention heads per block; divides d_model")
    max_positions: int | None = option(
        None, "longest sequence in tokens; default: the training sequence length"
    )
    activation: str = option(
        "relu2", "activation of the FFN: ReLU or its square, which is sparser", choices=("relu", "relu2")
    )


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained. One optimizer step sees batch_size x sequence_length tokens."""

    steps: int = option(500, "optimizer steps in all")
    batch_size: int = option(8, "sequences per optimizer step")
    sequence_length: int = option(256, "tokens per sequence")
    optimizer: str = option("adamw", "optimizer of torch.optim", choices=("adamw", "sgd"))
    learning_rate: float = option(1e-3, "peak learning rate")
    router_learning_rate: float = option(1e-2, "peak learning rate of the routers")
    warmup_fraction: float = option(0.05, "fraction of all steps with linearly rising learning rate")
    decay_fraction: float = option(
        0.4, "fraction of all steps, at the end, with linearly falling learning rate"
    )
    weight_decay: float = option(0.1, "decoupled weight decay of matrices (none for biases, norms, routers)")
    beta1: float = option(0.9, "AdamW's first-moment decay, or SGD's momentum")
    beta2: float = option(0.95, "AdamW's second-moment decay")
    grad_clip: float = option(1.0, "largest global gradient norm, routers apart; 0 = never clip")
    seed: int = option(0, "random seed of initial weights and data order")
    gradient_accumulation_steps: int = option(
        1, "parts that a process's share of the batch is cut into, one after another; divides it"
    )
    parallel: str = option(
        "ddp",
        "several processes (torchrun): ddp = each holds the whole model; fsdp = each holds its share of it",
        choices=("ddp", "fsdp"),
    )
    precision: str = option(
        "float32", "of the multiplications; weights stay in float32", choices=("float32", "bfloat16")
    )
    activation_checkpointing: bool = option(
        False, "compute each block's activations again in the backward pass instead of keeping them"
    )
    compile: bool = option(False, "torch.compile each block (needs a C++ compiler on the CPU)")
    threads: int | None = option(None, "CPU threads; default: torch's choice")
    device: str | None = option(None, "torch device; default: cuda if there is one, else cpu")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    eval_every: int = option(100, "steps between validations in both modes; 0 = only at the end")
    eval_tokens: int = option(65_536, "validation tokens used each time, the same ones every time")
    checkpoint_every: int = option(100, "steps between checkpoints")
    keep: int = option(3, "checkpoints to keep, newest first; 0 = all")
    snapshots: int = option(
        8, "model weights kept over the run for `switchable study`, closer together early on; 0 = none"
    )
    sample_prompt: str | None = option(
        None, "text that the finished model continues in both modes; none = no sample"
    )


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run. Saved as `config.yaml` in the run's folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    switch: SwitchConfig = field(default_factory=SwitchConfig)


def check(config: RunConfig) -> None:
    """Refuse settings that cannot work, before any work is done.

    Raises:
        InputError: says which, what is allowed, and what to do.
    """
    model, train = config.model, config.train
    for section, names in (
        (
            train,
            (
                "steps",
                "batch_size",
                "sequence_length",
                "log_every",
                "checkpoint_every",
                "eval_tokens",
                "gradient_accumulation_steps",
            ),
        ),
        (model, ("d_model", "num_layers", "num_heads")),
    ):
        for name in names:
            if getattr(section, name) < 1:
                raise InputError(
                    f"{name}={getattr(section, name)} is out of range; use a whole number of at least 1"
                )
    if train.sequence_length < 2:
        raise InputError("sequence_length=1 predicts nothing; use at least 2 tokens")
    if model.d_model % model.num_heads:
        allowed = ", ".join(map(str, divisors_near(model.d_model, model.num_heads)))
        raise InputError(
            f"num_heads={model.num_heads} does not divide d_model={model.d_model}; use one of {allowed}"
        )
    if d_ff(model) < 1:
        raise InputError(f"d_ff={d_ff(model)} is out of range; use a whole number of at least 1")
    if d_ff(model) % config.switch.num_experts:
        allowed = ", ".join(map(str, divisors_near(d_ff(model), config.switch.num_experts)))
        raise InputError(
            f"num_experts={config.switch.num_experts} does not divide d_ff={d_ff(model)}; use one of {allowed}"
        )
    if model.max_positions is not None and model.max_positions < train.sequence_length:
        raise InputError(
            f"sequence_length={train.sequence_length} is longer than the model's max_positions={model.max_positions}; "
            "shorten the sequences or give the model more positions"
        )
    _check_objective(config)
    for name in ("warmup_fraction", "decay_fraction"):
        if not 0.0 <= getattr(train, name) <= 1.0:
            raise InputError(f"{name}={getattr(train, name)} is out of range; use a number from 0 to 1")
    if train.snapshots < 0:
        raise InputError(f"snapshots={train.snapshots} is out of range; use a whole number of at least 0")
    for name in ("learning_rate", "router_learning_rate"):
        if not getattr(train, name) > 0:
            raise InputError(f"{name}={getattr(train, name)} is out of range; use a positive number")


FAMILY_OBJECTIVES = {"bert": "masked", "roberta": "masked", "t5": "span"}
"""What the families learn that do not learn to predict the next token."""


def objective_of(config: RunConfig) -> str:
    """Return what the model learns: the objective given, or that of its family."""
    return config.objective.objective or FAMILY_OBJECTIVES.get(config.model.family, "causal")


def _check_objective(config: RunConfig) -> None:
    name, family = objective_of(config), config.model.family
    fitting = FAMILY_OBJECTIVES.get(family, "causal")
    if name != fitting:
        others = ", ".join(f for f, o in FAMILY_OBJECTIVES.items() if o == name) or "gpt2, say"
        raise InputError(
            f"objective={name} does not fit family={family}, which learns objective={fitting}; leave the objective "
            f"out, or use a family that learns it ({others})"
        )
    if config.objective.whole_words and name != "masked":
        raise InputError(f"whole_words is for objective=masked, not for {name}; leave it out")
    if config.data.tokenizer is None:
        check_vocab_size(config.data.vocab_size, name)


def d_ff(model: ModelConfig) -> int:
    """Return the neurons per FFN."""
    return model.d_ff if model.d_ff is not None else 4 * model.d_model


def sections() -> dict[str, type]:
    """Return the sections of a run's configuration: YAML key -> dataclass."""
    hints = typing.get_type_hints(RunConfig)
    return {f.name: hints[f.name] for f in dataclasses.fields(RunConfig)}


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the configuration as plain nested dicts, lists and scalars (for YAML and JSON)."""
    plain = dataclasses.asdict(config)
    return {
        section: {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        for section, fields in plain.items()
    }


def from_dict(given: dict[str, Any], where: str = "the configuration") -> RunConfig:
    """Build a configuration from nested dicts; missing keys keep their defaults, or are the recipe's.

    Raises:
        InputError: an unknown section or key (the nearest known one is named), or a value of the wrong type.
    """
    _check_sections(given, where)
    known = sections()
    built: dict[str, Any] = {}
    for section, values in sorted(given.items(), key=lambda item: item[0] == "switch"):
        place = f"{where}, section {section!r}"
        if section == "switch":  # the last one: its recipe asks for the others
            model, train = built.get("model", ModelConfig()), built.get("train", TrainConfig())
            values = _filled(values, model, train, place)
        built[section] = _build(known[section], values, place)
    return RunConfig(**built)


def _check_sections(given: dict[str, Any], where: str) -> None:
    known = sections()
    for section, values in given.items():
        if section not in known:
            raise InputError(
                f"{where}: unknown section {section!r}; allowed: {', '.join(known)}{nearest(section, known)}"
            )
        if not isinstance(values, dict):
            raise InputError(f"{where}: section {section!r} must hold `key: value` lines, not {values!r}")


def _filled(switch: dict[str, Any], model: ModelConfig, train: TrainConfig, where: str) -> dict[str, Any]:
    """Return the settings of switching that are given and, if their recipe is known, those that it fills in."""
    name = switch.get("recipe", "early")
    if name == "auto":
        gated = model.family == "llama"
        name = recipes.fitting(model.d_model, model.activation, gated, train.precision, train.device)
    if name not in ("early", "late"):
        return switch
    if "num_experts" in switch:
        switch = switch | {"num_experts": coerce(switch["num_experts"], int, f"{where}: num_experts")}
    return recipes.settings(name, switch, d_ff(model), model.activation) | {"recipe": name}


def load(path: Path | None, flags: dict[str, Any]) -> RunConfig:
    """Read a YAML file (or none) and lay the flags (field name -> value) over it.

    What neither says of switching is filled in by the recipe that fits the machine, `recipe: auto`.

    Raises:
        InputError: file missing or not YAML, unknown key, wrong type.
    """
    where = "the flags" if path is None else str(path)
    given = {} if path is None else read_yaml(path)
    _check_sections(given, where)
    for section, cls in sections().items():
        for f in dataclasses.fields(cls):
            if f.name in flags:
                given.setdefault(section, {})[f.name] = flags[f.name]
    # What is wrong is refused before torch is loaded to see what the machine can do.
    for recipe in ("late", "auto"):
        config = from_dict(given | {"switch": {"recipe": recipe} | given.get("switch", {})}, where)
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of sections; an empty file is an empty configuration.

    Raises:
        InputError: file missing, not UTF-8 or not YAML, or not a mapping.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"config file {path} does not exist; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} is not readable YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise InputError(f"config file {path} cannot be read: {error.strerror}") from None
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise InputError(
            f"config file {path} must hold sections ({', '.join(sections())}), not {type(given).__name__}"
        )
    return given


def changed(old: RunConfig, new: RunConfig) -> list[str]:
    """Return one `section.key: old -> new` line per field in which two configurations differ."""
    a, b = to_dict(old), to_dict(new)
    return [f"{s}.{k}: {a[s][k]!r} -> {b[s][k]!r}" for s in a for k in a[s] if a[s][k] != b[s][k]]


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise InputError(
                f"{where}: unknown key {key!r}{nearest(str(key), hints)}; allowed: {', '.join(hints)}"
            )
    return build(cls, values, where)


def to_flat(path: Path) -> dict[str, Any]:
    """Read a YAML file into field name -> value, the form flags have.

    Raises:
        InputError: as `read_yaml` and `from_dict`.
    """
    given = read_yaml(path)
    from_dict(given, str(path))
    return {key: value for values in given.values() for key, value in values.items()}
