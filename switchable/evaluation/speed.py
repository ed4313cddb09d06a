"""How fast a model writes in each way it can multiply, beside what it loses: the choice of K and mass in one picture.

    tokens/s = new tokens / median seconds of a text        one sequence, greedy, prompt included, ways in turns

Beside it stand those of the middle half of the turns: what differs by less is noise.

The prompt is the beginning of the text that the loss is of. So tokens are of the kind that the router was made for, and
the number of experts that a mass leaves them is the true one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from switchable.compute.cpu.topk import top_experts
from switchable.evaluation.scores import Score
from switchable.evaluation.ways import Way, multiplying
from switchable.ffn.convert import layers_of
from switchable.ffn.ssd import SSD
from switchable.infer.decoding.decoder import Decoder
from switchable.infer.generate import decoding
from switchable.infer.loss import positions_of
from switchable.infer.precision import multiplying_in
from switchable.infer.sampling import Sampling
from switchable.study.canvas import (
    DENSE,
    MARKERS,
    SPARSE,
    Picture,
    draw_picture,
    legend_above,
    plain_axes,
    write_picture,
)
from switchable.timing import take_turns

PROMPT, NEW = 32, 64
"""Tokens read, tokens written."""
TURNS, SECONDS = 5, 5.0
"""How often in each way at least, and for how long all of them together."""
COUNTED = 512
"""Tokens of text on which the experts of a token are counted."""
COLOURS = (SPARSE, "#0072b2", "#009e73", "#cc79a7")


@dataclass(frozen=True)
class Speed:
    """One way: what it costs in loss, what it gives in speed."""

    way: Way
    loss: float
    """Nats per predicted token."""
    tokens_per_second: float
    middle: tuple[float, float]
    """The same at the slower and the faster quartile of the turns."""
    experts: float | None
    """Mean number of experts that a token computes, in the layers that are sparse."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        rest = asdict(self)
        return {**rest.pop("way"), **rest}


def speeds(
    model: Any, ids: Sequence[int], found_ways: Sequence[Way], scores: Sequence[Score], weights: str
) -> tuple[list[Speed], str]:
    """Time a causal model's writing in some ways, by what `switchable generate` writes with, the same for all of them.

    Args:
        model: its weights are taken over (see `Decoder`): nothing else can be done with it afterwards.
        ids: the text's tokens.
        found_ways: their losses are among the scores.
        scores: of the text.
        weights: their width.

    Returns:
        The speeds, and what wrote, in words.
    """
    positions = positions_of(model) or COUNTED
    device = next(model.parameters()).device
    prompt_1S = torch.tensor(ids[: max(1, min(PROMPT, positions // 2))], device=device)[None]
    new = min(NEW, positions - prompt_1S.shape[1])
    text_1S = torch.tensor(ids[: min(COUNTED, positions)], device=device)[None]
    experts = [mean_experts(model, way, text_1S) for way in found_ways]
    sampling = Sampling(max_new_tokens=new, temperature=0)
    hardest = max(found_ways, key=lambda way: (way.mode == "sparse", way.mass < 1))
    with multiplying(model, hardest):
        ready, why_not = decoding(model, weights, hardest.mode, sampling)

    def write(way: Way) -> None:
        with multiplying(model, way):
            if isinstance(ready, Decoder):
                _decode(ready, prompt_1S, new)
            else:
                sampling.generate(model, prompt_1S, new, min_new_tokens=new, pad_token_id=0)

    calls = {str(way): partial(write, way) for way in found_ways}
    precision: AbstractContextManager[Any] = nullcontext()
    by = "our own decoding"
    if why_not is not None:
        precision = multiplying_in(model, "float32" if weights == "float32" else "bfloat16")
        by = f"transformers' generate (for our own decoding it {why_not})"
    with precision:
        seconds = take_turns(calls, SECONDS, turns=TURNS).seconds
    losses = {s.way: s.value for s in scores if s.task == "text" and s.metric.startswith("loss")}
    found = []
    for way, mean in zip(found_ways, experts, strict=True):
        fast, median, slow = (new / each for each in quantiles(seconds[str(way)], n=4))
        found.append(Speed(way, losses[way], median, (slow, fast), mean))
    return found, f"one sequence, {prompt_1S.shape[1]} + {new} tokens, weights in {weights}, by {by}"


def _decode(decoder: Decoder, prompt_1S: Tensor, new: int) -> None:
    logits_1V = decoder.begin(prompt_1S, None, prompt_1S.shape[1] + new)
    for _ in range(new - 1):
        logits_1V = decoder.next(logits_1V.argmax(-1))


@torch.no_grad()
def mean_experts(model: nn.Module, way: Way, input_ids: Tensor) -> float | None:
    """Return how many experts a token computes in a way, on average over tokens and sparse layers; None if dense."""
    counts: list[float] = []

    def count(ssd: SSD, _router: nn.Module, _x: object, scores_TE: Tensor) -> None:
        ids_TK = top_experts(scores_TE, ssd.experts_per_token, ssd.mass)
        counts.append(float((ids_TK < ssd.num_experts).sum(-1).double().mean()))

    with multiplying(model, way), ExitStack() as hooks:
        for layer in layers_of(model):
            if layer.ssd.mode == "sparse":
                hooks.enter_context(layer.router.register_forward_hook(partial(count, layer.ssd)))
        model(input_ids=input_ids)
    return sum(counts) / len(counts) if counts else None


def table(found: Sequence[Speed]) -> str:
    """Return the speeds as text: a line for each way."""
    width = max(len(str(speed.way)) for speed in found)
    lines = [f"{'way':{width}}  {'loss':>8}  {'tokens/s':>8}  {'half of the turns':>17}  experts of a token"]
    for each in found:
        experts = "all" if each.experts is None else f"{each.experts:.1f}"
        middle = "{:.1f} to {:.1f}".format(*each.middle)
        numbers = f"{each.loss:8.4f}  {each.tokens_per_second:8.1f}  {middle:>17}"
        lines.append(f"{each.way!s:{width}}  {numbers}  {experts}")
    return "\n".join(lines)


def draw(found: Sequence[Speed], title: str, path: Path) -> None:
    """Draw loss against tokens per second into a PNG file: dense, and a line over K for each mass."""
    sparse = sorted((each for each in found if each.way.mode == "sparse"), key=_most_experts)

    def panel(_picture: Picture, axes: Axes) -> None:
        for number, mass in enumerate(sorted({each.way.mass for each in sparse}, reverse=True)):
            _draw_line(axes, [each for each in sparse if each.way.mass == mass], number)
        for each in found:
            if each.way.mode == "dense":
                axes.plot([each.tokens_per_second], [each.loss], "*", color=DENSE, ms=10, label="dense")
                axes.hlines(each.loss, *each.middle, color=DENSE, lw=0.8)
        axes.set_xlabel("tokens per second, one sequence")
        axes.set_ylabel("loss (nats per token)")
        axes.set_title(title, pad=32)
        plain_axes(axes)
        legend_above(axes)

    write_picture(draw_picture([panel]), path)


def _draw_line(axes: Axes, own: Sequence[Speed], number: int) -> None:
    """Draw the ways of one mass, each with its K."""
    mass, colour = own[0].way.mass, COLOURS[number % len(COLOURS)]
    label = "K experts" if mass == 1 else f"up to K, shares adding up to {mass:g}"
    places = [(each.tokens_per_second, each.loss) for each in own]
    marker = MARKERS[number % len(MARKERS)]
    axes.plot(*zip(*places, strict=True), label=label, color=colour, marker=marker, ms=4, lw=1.2)
    offset = (4, -11 if number else 4)
    for each, place in zip(own, places, strict=True):
        axes.hlines(each.loss, *each.middle, color=colour, lw=0.8)
        k = each.way.experts_per_token
        text = "own" if isinstance(k, tuple) else str(k)
        axes.annotate(text, place, offset, textcoords="offset points", fontsize=8, color=colour)


def _most_experts(each: Speed) -> float:
    k = each.way.experts_per_token
    return float(max(n for n in k if n is not None) if isinstance(k, tuple) else k or 0)
