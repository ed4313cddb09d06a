"""Tokens per second of our decoding path at each width of weights, beside transformers' `generate`, dense.

    python -m benchmarks.decode [--quick] [--peers]

    one, 8 and 32 sequences, greedy, a prompt of 8 tokens; prefill of 512 tokens; parity first, then all in turns
    best dense = the faster of `generate` with float32 and with bfloat16 weights
    bandwidth_share = bytes of bfloat16 weights that a token needs (6 of 32 experts, half of their `down`) · tokens/s
                      / rate of a plain copy (bytes read and written)

With --peers llama.cpp takes its turns too, with the same weights as float32, bfloat16, Q8_0 and Q4_0; it is left out
where `llama-cpp-python` and `gguf` are not installed.

Besides, what sparse FFNs gain in `generate` itself, and what Amdahl's law would allow:

    bound = t_dense / (t_dense - L · (f_dense - f_sparse)),     share_of_amdahl = (t_dense / t_sparse) / bound

t is the time of `generate` per new token (KV cache on, greedy), f one FFN's forward for one token (router included),
L the number of layers, all sparse here. Between two timings of an FFN the weights of all layers are read, as in
decoding, so that they do not come from the cache. `ffn_bandwidth_share` is the weight bytes that one sparse FFN reads
per second over that rate of a copy. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._models import decoding_parity_error, random_gpt2
from switchable.ffn.convert import layers_of, set_mode
from switchable.ffn.placement import PerThread
from switchable.infer.decoding.decoder import Decoder
from switchable.infer.decoding.matrices import WIDTHS
from switchable.timing import take_turns

VOCABULARY, POSITIONS, EXPERTS, K = 8192, 768, 32, 6
PROMPT, PREFILL, BATCHES = 8, 512, (1, 8, 32)
SHORT = {"float32": "float32", "bfloat16": "bf16", "int8": "int8"}
"""Of widths, in the names of figures."""


def prompts(sequences: int, length: int = PROMPT) -> Tensor:
    """Return random prompts [B, S]."""
    return torch.randint(1, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(0))


def generate(model: Any, ids_BS: Tensor, new_tokens: int, mode: str = "dense") -> Tensor:
    """Return what transformers writes, prompts included."""
    set_mode(model, mode)
    written: Tensor = model.generate(
        input_ids=ids_BS,
        attention_mask=torch.ones_like(ids_BS),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    return written


@torch.inference_mode()
def decode(decoder: Decoder, ids_BS: Tensor, new_tokens: int, mode: str = "sparse") -> Tensor:
    """Return what our decoder writes, prompts included; as above, the end of text is never taken."""
    set_mode(decoder.model, mode)
    logits_BV, tokens = decoder.begin(ids_BS, None, ids_BS.shape[1] + new_tokens), [ids_BS]
    for left in range(new_tokens, 0, -1):
        logits_BV[:, 0] = -torch.inf
        tokens.append(logits_BV.argmax(-1, keepdim=True))
        if left > 1:
            logits_BV = decoder.next(tokens[-1][:, 0])
    return torch.cat(tokens, dim=1)


class Contenders:
    """A model in every way that is timed.

    Args:
        model: converted, float32.
        peers: whether llama.cpp is one of them.
    """

    def __init__(self, model: nn.Module, peers: bool = False):
        self.llama_cpp: Any = None
        if peers:
            from benchmarks._llama_cpp import LlamaCpp  # which not everybody has

            self.llama_cpp = LlamaCpp(model)
        self.dense = {name: copy.deepcopy(model).to(WIDTHS[name]) for name in ("float32", "bfloat16")}
        self.decoders = {name: Decoder(copy.deepcopy(model), name) for name in WIDTHS}

    def parity(self) -> bool:
        """Whether the decoder of float32 weights writes what `generate` does, in both modes."""
        return all(
            torch.equal(
                generate(self.dense["float32"], prompts(2), 12, mode),
                decode(self.decoders["float32"], prompts(2), 12, mode),
            )
            for mode in ("dense", "sparse")
        )

    def seconds(self, sequences: int, length: int, new_tokens: int, rounds: int) -> dict[str, float]:
        """Return the seconds of each: `dense_*` is `generate`, `ours_dense_*` and `ours_*` (sparse) the decoder."""
        ids_BS = prompts(sequences, length)
        calls: dict[str, Callable[[], object]] = {
            f"dense_{SHORT[name]}": functools.partial(generate, model, ids_BS, new_tokens)
            for name, model in self.dense.items()
        }
        for name, decoder in self.decoders.items():
            for mode, prefix in (("sparse", "ours"), ("dense", "ours_dense")):
                calls[f"{prefix}_{SHORT[name]}"] = functools.partial(
                    decode, decoder, ids_BS, new_tokens, mode
                )
        if self.llama_cpp is not None:
            calls |= self.llama_cpp.calls(ids_BS, new_tokens)
        return take_turns(calls, 0.0, turns=rounds).medians


def rates(contenders: Contenders, quick: bool) -> dict[str, float]:
    """Return tokens per second of all ways by batch, of prefill, and their ratios to the best dense way."""
    found: dict[str, float] = {}
    rounds = 3 if quick else 9
    for sequences in BATCHES:
        new_tokens = (32 if sequences == 1 else 12) if quick else 64
        seconds = contenders.seconds(sequences, PROMPT, new_tokens, rounds)
        rate = {name: sequences * new_tokens / each for name, each in seconds.items()}
        best = max(rate["dense_float32"], rate["dense_bf16"])
        found |= {f"batch{sequences}_{name}": each for name, each in rate.items()}
        found[f"batch{sequences}_over_best_dense"] = max(rate["ours_bf16"], rate["ours_float32"]) / best
    seconds = contenders.seconds(1, PREFILL, 1, rounds)
    found |= {f"prefill_{name}": PREFILL / each for name, each in seconds.items()}
    best = min(seconds["dense_float32"], seconds["dense_bf16"])
    found["prefill_over_best_dense"] = best / min(seconds["ours_bf16"], seconds["ours_float32"])
    found |= {f"tokens_per_second_{short}": found[f"batch1_ours_{short}"] for short in SHORT.values()}
    if contenders.llama_cpp is not None:
        for own, theirs in (("bf16", "bf16"), ("int8", "q8_0")):
            found[f"over_llamacpp_{theirs}"] = (
                found[f"batch1_ours_{own}"] / found[f"batch1_llamacpp_{theirs}"]
            )
    return found


def needed_bytes(d_model: int, num_layers: int) -> float:
    """Return the bytes of bfloat16 weights that a token needs: attention, chosen experts, head."""
    chosen_FD = 4 * d_model * d_model * K / EXPERTS
    return 2 * (num_layers * (4 * d_model**2 + 1.5 * chosen_FD) + VOCABULARY * d_model)


def tokens_per_second(model: nn.Module, new_tokens: int, rounds: int) -> dict[str, float]:
    """Return tokens per second of `generate` in each mode, timed in turns."""
    calls = {
        mode: functools.partial(generate, model, prompts(1), new_tokens, mode) for mode in ("dense", "sparse")
    }
    medians = take_turns(calls, 0.0, turns=rounds).medians
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
            layer.ssd.mode, layer.ssd.call_cache = mode, PerThread()

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


def measure(d_model: int, num_layers: int, quick: bool, peers: bool = False) -> dict[str, float] | None:
    """Return the figures of one model, or None if the modes disagree, or the decoder and `generate`."""
    model = random_gpt2(d_model, num_layers, VOCABULARY, POSITIONS, EXPERTS, K).eval()
    if not decoding_parity_error(model, torch.arange(1, 9).view(1, 8)) < 1e-5:
        return None
    contenders = Contenders(model, peers)
    if not contenders.parity():
        return None
    rate = tokens_per_second(model, 32 if quick else 128, rounds=3 if quick else 9)
    one = ffn_seconds(model, 1, rounds=60 if quick else 300)
    sixteen = ffn_seconds(model, 16, rounds=30 if quick else 150)
    saved = num_layers * (one["dense"] - one["sparse"]) * rate["dense"]  # share of a dense token's time
    speedup, copied = rate["sparse"] / rate["dense"], copied_bytes_per_second(5)
    weight_bytes = 4 * 2 * d_model * 4 * d_model * K / EXPERTS
    ours = rates(contenders, quick)
    return {
        "tokens_per_second_dense": rate["dense"],
        "tokens_per_second_sparse": rate["sparse"],
        "decode_ffn_speedup": one["dense"] / one["sparse"],
        "decode_ffn_speedup_16_tokens": sixteen["dense"] / sixteen["sparse"],
        "decode_speedup": speedup,
        "decode_share_of_amdahl": speedup * (1 - saved),
        "ffn_bandwidth_share": weight_bytes / one["sparse"] / copied,
        "bandwidth_share": needed_bytes(d_model, num_layers) * ours["tokens_per_second_bf16"] / copied,
        **ours,
    }


HEADLINES = (
    "decode_ffn_speedup", "decode_speedup", "decode_share_of_amdahl", "tokens_per_second_float32",
    "tokens_per_second_bf16", "tokens_per_second_int8", "prefill_over_best_dense", "batch8_over_best_dense",
    "batch32_over_best_dense", "bandwidth_share", "over_llamacpp_bf16", "over_llamacpp_q8_0",
)  # fmt: skip
"""Figures of the largest model, under their plain names."""


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="D=256 and GPT-2 small (D=768, 12 layers), few rounds"
    )
    parser.add_argument("--peers", action="store_true", help="llama.cpp too")
    args = parser.parse_args()
    quick, peers = args.quick, args.peers
    if peers and not all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf")):
        print(
            "llama.cpp is left out: it takes `pip install llama-cpp-python gguf`, which builds it from source"
        )
        peers = False
    figures: dict[str, float | None] = {}
    for d_model, num_layers in [(256, 8), (768, 12)] if quick else [(256, 8), (512, 8), (768, 12)]:
        found = measure(d_model, num_layers, quick, peers)
        if found is None:
            print(
                "sparse mode with all experts on differs from dense mode, or our decoding from `generate`: "
                "nothing is reported",
                file=sys.stderr,
            )
            return 1
        print(f"D={d_model}, {num_layers} layers, {EXPERTS} experts, K={K}")
        for key, value in found.items():
            print(f"    {key:40} {value:9.2f}")
        figures |= {f"{key}_d{d_model}": value for key, value in found.items()}
        figures |= {key: found.get(key) for key in HEADLINES}  # those of the last model stay
    print(json.dumps({"benchmark": "decode", "threads": torch.get_num_threads(), **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
