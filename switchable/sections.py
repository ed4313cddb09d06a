"""The model to pre-train and how: two sections of a run's configuration (`config.py` has the whole)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from switchable.errors import InputError, divisors_near
from switchable.options import check, fraction, option, refuse_more_than_memory
from switchable.recipes import AUTO


class Buildable(NamedTuple):
    """A family of models that can be pre-trained from scratch."""

    objective: str = "causal"  # what it learns: `"causal"`, `"masked"` or `"span"`
    gated: bool = False  # whether its FFNs are gated
    positions: bool = True  # whether it has an embedding for each position


BUILDABLE = {
    "gpt2": Buildable(),
    "opt": Buildable(),
    "llama": Buildable(gated=True, positions=False),
    "arcee": Buildable(positions=False),
    "bert": Buildable("masked"),
    "roberta": Buildable("masked"),
    "t5": Buildable("span", positions=False),
}
"""By model type of transformers; `ffn/builders.py` builds them."""


@dataclass(frozen=True)
class ModelConfig:
    """The model to pre-train: a transformers architecture with an FFN whose activation is sparse."""

    family: str = option(
        "gpt2", "model type of transformers; it decides what is learned", choices=tuple(BUILDABLE)
    )
    d_model: int = option(256, "width of the residual stream", least=1, most=2**20, metavar="D")
    d_ff: int | None = option(None, "neurons per FFN; none: 4 x d_model", least=1, most=2**24, metavar="F")
    num_layers: int = option(4, "Transformer blocks", least=1, most=10_000)
    num_heads: int = option(4, "attention heads per block; divides d_model", least=1)
    max_positions: int | None = option(
        None,
        "longest sequence in tokens; none: the training sequence length",
        least=2,
        most=2**24,
        flag=False,
    )
    activation: str = option(
        "relu2", "activation of the FFN: ReLU, or its square, which is sparser", choices=("relu", "relu2")
    )

    def __post_init__(self) -> None:
        check(self)
        if self.d_model % self.num_heads:
            allowed = ", ".join(map(str, divisors_near(self.d_model, self.num_heads)))
            raise InputError(
                f"num_heads={self.num_heads} does not divide d_model={self.d_model}; use one of {allowed}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained. One optimizer step sees batch_size x sequence_length tokens."""

    steps: int = option(500, "optimizer steps in all", least=1)
    batch_size: int = option(8, "sequences per optimizer step", least=1)
    sequence_length: int = option(256, "tokens per sequence", least=2, most=2**24, metavar="TOKENS")
    learning_rate: float = option(1e-3, "peak learning rate", above=0, most=1000, metavar="LR")
    weight_decay: float = option(
        0.1,
        "decoupled weight decay of matrices (none for biases, norms, routers)",
        least=0,
        most=1000,
        metavar="RATE",
    )
    seed: int = option(0, "random seed of initial weights and data order", least=0, most=2**32 - 1)
    precision: str = option(
        "float32",
        "of the multiplications; weights stay in float32; auto = bfloat16 where this machine multiplies the model's "
        "FFNs faster in it, measured once",
        choices=(AUTO, "float32", "bfloat16"),
    )
    device: str | None = option(None, "torch device; none: cuda if there is one, else cpu")
    threads: int | None = option(None, "CPU threads; none: torch's choice", least=1, most=1024)
    eval_every: int = option(100, "steps between validations; 0 = only at the end", least=0, metavar="STEPS")
    checkpoint_every: int = option(100, "steps between checkpoints", least=1, metavar="STEPS")
    sample_prompt: str | None = option(
        None, "text that the finished model continues in both modes; none: no sample", metavar="TEXT"
    )
    optimizer: str = option(
        "adamw",
        "of torch.optim; muon: for the matrices of the blocks, adamw for all else",
        choices=("adamw", "muon", "sgd"),
        advanced=True,
    )
    router_learning_rate: float = option(
        1e-2, "peak learning rate of the routers", above=0, most=1000, metavar="LR", advanced=True
    )
    gradient_accumulation_steps: int = option(
        1,
        "parts that a process's share of the batch is cut into, one after another; divides it",
        least=1,
        advanced=True,
    )
    parallel: str = option(
        "ddp",
        "several processes (torchrun): ddp = each holds the whole model; fsdp = each holds its share of it",
        choices=("ddp", "fsdp"),
        advanced=True,
    )
    activation_checkpointing: bool = option(
        False,
        "compute each block's activations again in the backward pass instead of keeping them",
        advanced=True,
    )
    compile: bool = option(False, "torch.compile each block (needs a C++ compiler on the CPU)", advanced=True)
    warmup_fraction: float = fraction(0.05, "fraction of all steps with a rising learning rate", flag=False)
    decay_fraction: float = fraction(
        0.4, "fraction of all steps, at the end, with linearly falling learning rate", flag=False
    )
    beta1: float = option(0.9, "AdamW's first-moment decay, or SGD's momentum", least=0, below=1, flag=False)
    beta2: float = option(0.95, "AdamW's second-moment decay", least=0, below=1, flag=False)
    grad_clip: float = option(
        1.0, "largest gradient norm, routers apart; 0 = never clip", least=0, flag=False
    )
    log_every: int = option(10, "steps between lines of metrics.jsonl", least=1, flag=False)
    eval_tokens: int = option(65_536, "validation tokens, the same ones every time", least=1, flag=False)
    probe_tokens: int = option(2048, "validation tokens on which layers are measured", least=1, flag=False)
    keep: int = option(3, "checkpoints to keep, newest first; 0 = all", least=0, flag=False)
    snapshots: int = option(
        8,
        "model weights kept over the run for `switchable study`, closer together early on",
        least=0,
        most=1000,
        flag=False,
    )

    def __post_init__(self) -> None:
        check(self)


def check_memory(model: ModelConfig, vocab_size: int, sequence_length: int) -> None:
    """Raise InputError for a model whose weights alone are more than this machine's memory."""
    kind, neurons = BUILDABLE[model.family], d_ff(model)
    block = model.d_model * (4 * model.d_model + (3 if kind.gated else 2) * neurons)
    rows = vocab_size + (model.max_positions or sequence_length if kind.positions else 0)
    refuse_more_than_memory(
        4 * (model.num_layers * block + rows * model.d_model),
        f"a model of {model.num_layers} layers with d_model={model.d_model}, d_ff={neurons} and {rows} embeddings",
    )


def d_ff(model: ModelConfig) -> int:
    """Return the neurons per FFN."""
    return model.d_ff if model.d_ff is not None else 4 * model.d_model
