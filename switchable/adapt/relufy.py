"""ReLU in place of another activation, and some training with it (the route of Mirzadeh et al., "ReLU Strikes Back").

GELU and SiLU are zero almost nowhere, so an FFN with them has no experts to leave out. With ReLU in their place a
model is worse at first, learns back most of it in a small part of its pre-training, and is sparse.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedConfig

from switchable.errors import InputError
from switchable.ffn.families import Family
from switchable.finite import check_finite
from switchable.sections import TrainConfig
from switchable.switching.measures import Batch
from switchable.train.optim import build_optimizer, clip_gradients, set_learning_rate

WARMUP, DECAY = 0.1, 0.9
"""Fractions of all steps with a rising and a falling learning rate."""
LOWER = "lower --relufy-learning-rate"


def with_relu(config: PreTrainedConfig, family: Family) -> PreTrainedConfig:
    """Return a model's config with ReLU in its FFNs (a gated FFN stays gated).

    Raises:
        InputError: it has ReLU, or squared ReLU, already, or nothing in the config names an activation.
    """
    setting = family.activation_setting
    if not hasattr(config, setting):
        raise InputError(
            f"the config of {config.model_type} has no {setting} to set to ReLU; build the model with ReLU, train it "
            "on and convert that, without --relufy"
        )
    old = str(getattr(config, setting))
    if old.removeprefix("gated-") in ("relu", "relu2"):
        raise InputError(f"the model's activation is {old} already: leave out --relufy")
    values = config.to_dict()
    for derived in ("dense_act_fn", "is_gated_act"):  # T5 makes them of the setting
        values.pop(derived, None)
    values[setting] = "gated-relu" if old.startswith("gated-") else "relu"
    return type(config).from_dict(values)


def train_on(
    model: nn.Module, batch: Callable[[int], Batch], steps: int, peak: float, advance: Callable[[int], object]
) -> None:
    """Train all weights of a plain model for some steps; it is in evaluation mode afterwards.

    `batch` gives the model inputs with labels of a step, `peak` is the learning rate's, `advance` is told 1 after each
    step.

    Raises:
        InputError: the loss or a weight is no longer finite.
    """
    config = TrainConfig(
        steps=steps, learning_rate=peak, weight_decay=0.0, warmup_fraction=WARMUP, decay_fraction=DECAY
    )
    optimizer = build_optimizer(model, config)
    model.train()
    for step in range(steps):
        set_learning_rate(optimizer, step, config)
        loss = model(**batch(step)).loss
        loss.backward()
        clip_gradients(optimizer, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        advance(1)
    model.eval()
    check_finite(model, "the model trained on with ReLU", LOWER)
    if not loss.isfinite():
        raise InputError(f"the loss became {float(loss)} while training with ReLU; {LOWER}")
