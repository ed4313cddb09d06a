"""Decoding one token at a time with transformers' `generate`, dense and sparse, and what Amdahl's law would allow.

    python -m benchmarks.decode [--quick]

    bound = t_dense / (t_dense - L · (f_dense - f_sparse)),     share_of_amdahl = (t_dense / t_sparse) / bound

t is the time of `generate` per new token (KV cache on, greedy), f one FFN's forward for one token (router included),
L the number of layers, all sparse here. Between two timings of an FFN the weights of all layers are read, as in
decoding, so that they do not come from the cache. `bandwidth_share` is the weight bytes that one sparse FFN reads per
second over the rate of a plain copy (bytes read and written). The
last line is one JSON document.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Callable

import torch
from torch import nn

from benchmarks._models import decoding_parity_error, random_gpt2
from switchable.ffn.convert import layers_of, set_mode
from switchable.ffn.ssd import DecodeCache
from switchable.timing import take_turns

VOCABULARY, POSITIONS, EXPERTS, K = 8192, 256, 32, 6


def tokens_per_second(model: nn.Module, new_tokens: int, rounds: int) -> dict[str, float]:
    """Return tokens per second of `generate` in each mode, timed in turns."""
    prompt = torch.randint(1, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(0)).to(model.device)

    def generate(mode: str) -> None:
        set_mode(model, mode)
        model.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )

    contenders = {"dense": lambda: generate("dense"), "sparse": lambda: generate("sparse")}
    medians = take_turns(contenders, 0.0, turns=rounds).medians
    return {name: new_tokens / seconds for name, seconds in medians.items()}


@torch.no_grad()
def ffn_seconds(model: nn.Module, tokens: int, rounds: int) -> dict[str, float]:
    """Return the seconds of one FFN's forward for `tokens` tokens in each mode, going through all layers in turn."""
    layers = layers_of(model)
    inputs = torch.randn(61, 1, tokens, layers[0].ssd.d_model, generator=torch.Generator().manual_seed(1))
    drawn = itertools.cycle(inputs.unbind(0))

    def contender(mode: str) -> Callable[[], None]:
        own = [copy.copy(layer) for layer in layers]  # in a mode of their own, with the same weights
        for layer in own:
            layer.ssd = copy.copy(layer.ssd)
            layer.ssd.mode, layer.ssd.decode_cache = mode, DecodeCache()

        def forward() -> None:
            for layer in own:  # another token each time: it chooses other experts, which are not in the cache
                layer(next(drawn))

        return forward

    contenders = {"dense": contender("dense"), "sparse": contender("sparse")}
    medians = take_turns(contenders, 0.0, turns=rounds).medians
    return {name: seconds / len(layers) for name, seconds in medians.items()}


def copied_bytes_per_second(rounds: int) -> float:
    """Return the rate of a plain copy of 256 MB, bytes read and bytes written counted."""
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)

    def copied() -> None:
        target.copy_(source)

    return 2 * 4 * source.numel() / take_turns({"copy": copied}, 0.0, turns=rounds).median("copy")


def measure(d_model: int, num_layers: int, quick: bool) -> dict[str, float] | None:
    """Return the figures of one model, or None if the modes disagree."""
    model = random_gpt2(d_model, num_layers, VOCABULARY, POSITIONS, EXPERTS, K).eval()
    if not decoding_parity_error(model, torch.arange(1, 9).view(1, 8)) < 1e-5:
        return None
    rate = tokens_per_second(model, 32 if quick else 128, rounds=3 if quick else 9)
    one = ffn_seconds(model, 1, rounds=60 if quick else 300)
    sixteen = ffn_seconds(model, 16, rounds=30 if quick else 150)
    saved = num_layers * (one["dense"] - one["sparse"]) * rate["dense"]  # share of a dense token's time
    speedup = rate["sparse"] / rate["dense"]
    weight_bytes = 4 * 2 * d_model * 4 * d_model * K / EXPERTS
    return {
        "tokens_per_second_dense": rate["dense"],
        "tokens_per_second_sparse": rate["sparse"],
        "decode_ffn_speedup": one["dense"] / one["sparse"],
        "decode_ffn_speedup_16_tokens": sixteen["dense"] / sixteen["sparse"],
        "decode_speedup": speedup,
        "decode_share_of_amdahl": speedup * (1 - saved),
        "bandwidth_share": weight_bytes / one["sparse"] / copied_bytes_per_second(5),
    }


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="D=768 and D=256, few rounds (under 50 s)")
    quick = parser.parse_args().quick
    figures: dict[str, float] = {}
    for d_model, num_layers in [(256, 8), (768, 4)] if quick else [(256, 8), (512, 8), (768, 8)]:
        found = measure(d_model, num_layers, quick)
        if found is None:
            print(
                "sparse mode with all experts on differs from dense mode: nothing is reported",
                file=sys.stderr,
            )
            return 1
        print(f"D={d_model}, {num_layers} layers, {EXPERTS} experts, K={K}")
        for key, value in found.items():
            print(f"    {key:40} {value:9.2f}")
        figures |= {f"{key}_d{d_model}": value for key, value in found.items()}
        # The headline figures are those of the largest model.
        figures |= {
            key: found[key] for key in ("decode_ffn_speedup", "decode_speedup", "decode_share_of_amdahl")
        }
    print(json.dumps({"benchmark": "decode", "threads": torch.get_num_threads(), **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
