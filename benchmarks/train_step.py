"""A whole optimizer step of a GPT-2 type model in both modes, and what Amdahl's law would allow.

    python -m benchmarks.train_step [--quick] [--precision bfloat16] [--device cuda]

    speedup = best dense step / sparse step     bound = 1 / (1 - p + p / s)     share_of_amdahl = speedup / bound

A step is forward, backward, clipping and AdamW; all layers are sparse. p is the share that FFNs have of the best dense
step, taken in the step itself, forward and backward; s is the speed-up of one FFN, router included, on as many tokens.
With `--precision bfloat16` dense takes part in float32, under autocast and with weights of bfloat16, sparse in the
latter two, and the fastest of each counts; attention is what a run takes (`train/setup.py`). Everything is timed in
turns in one run, after sparse mode with all experts on has been found to be dense mode in logits and gradients, in
bfloat16 up to the rounding that dense mode has there. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._models import random_gpt2
from switchable.ffn.convert import layers_of, set_mode
from switchable.memory import keep_freed_memory
from switchable.timing import processor, take_turns

VOCABULARY, SEQUENCE, EXPERTS, K = 8192, 256, 32, 6
PRECISIONS = {"float32": ("float32",), "bfloat16": ("float32", "autocast", "weights")}
"""In what dense takes part; sparse in the last one or two."""
SIZES = {
    ("float32", True): [(256, 4, 16), (768, 2, 8)],
    ("float32", False): [(256, 4, 16), (512, 4, 16), (768, 4, 16)],
    ("bfloat16", True): [(768, 12, 16)],
    ("bfloat16", False): [(256, 5, 16), (512, 8, 16), (768, 12, 16)],
}
"""D, layers and sequences, by precision and whether it is to be quick."""


class Steps:
    """A model with what trains it, in several precisions; a contender's name says mode and precision."""

    def __init__(self, sizes: tuple[int, int, int], precision: str, device: str = "cpu"):
        (d_model, num_layers, batch_size), self.device = sizes, device
        self.precisions = PRECISIONS[precision]
        model = random_gpt2(d_model, num_layers, VOCABULARY, SEQUENCE, EXPERTS, K).train().to(device)
        self.models = dict.fromkeys(self.precisions, model)
        if "weights" in self.models:
            self.models["weights"] = copy.deepcopy(model).bfloat16()
        self.optimizers = {
            id(own): torch.optim.AdamW(own.parameters(), lr=0.0, weight_decay=0.0, fused=True)
            for own in self.models.values()
        }
        generator = torch.Generator().manual_seed(1)
        self.ids_BS = torch.randint(0, VOCABULARY, (batch_size, SEQUENCE), generator=generator).to(device)
        x = torch.randn(2, batch_size, SEQUENCE, d_model, generator=generator)
        self.x_BSD, self.dy_BSD = x.to(device)

    def contenders(self) -> list[str]:
        """All names: dense in every precision, sparse in the one that is measured."""
        sparse = self.precisions[1:] or self.precisions
        return [f"dense {own}" for own in self.precisions] + [f"sparse {own}" for own in sparse]

    def _prepared(self, name: str, experts: int = K) -> tuple[Any, Any]:
        """Set a model as a contender wants it; return it, and the context in which it multiplies."""
        mode, precision = name.split()
        model = self.models[precision]
        fused = precision == "float32" or self.device != "cpu"
        model.set_attn_implementation("sdpa" if fused else "eager")
        set_mode(model, mode, experts)
        return model, torch.autocast(self.device, torch.bfloat16, enabled=precision == "autocast")

    def wait(self) -> None:
        """Return when the device has done what it was asked for."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def step(self, name: str) -> None:
        """One optimizer step."""
        model, context = self._prepared(name)
        with context:
            loss = model(input_ids=self.ids_BS, labels=self.ids_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer = self.optimizers[id(model)]
        optimizer.step()
        optimizer.zero_grad()

    def ffn(self, name: str) -> None:
        """Forward and backward of the first FFN on as many tokens."""
        model, context = self._prepared(name)
        layer = layers_of(model)[0]
        x_BSD = self.x_BSD.to(layer.ssd.up_projection.weight.dtype).requires_grad_()
        with context:
            y_BSD = layer(x_BSD)
        y_BSD.backward(self.dy_BSD.to(y_BSD.dtype))
        layer.zero_grad()

    def errors(self) -> list[str]:
        """Return which sparse contenders with all experts on are further from dense in float32 than they may be."""
        exact = self._outputs("dense float32")

        def error(name: str) -> float:
            pairs = zip(self._outputs(name), exact, strict=True)
            return max(float((found - true).norm() / true.norm()) for found, true in pairs)

        found = {}
        for name in (name for name in self.contenders() if name.startswith("sparse")):
            precision = name.split()[1]
            allowed = 1e-5 if precision == "float32" else 2 * error(f"dense {precision}")
            if not (off := error(name)) <= allowed:
                found[name] = f"{name}: relative error {off:.1e}, allowed {allowed:.1e}"
        return list(found.values())

    def _outputs(self, name: str) -> tuple[Tensor, Tensor]:
        """Return logits and all gradients for one sequence, sparse mode with all experts on."""
        model, context = self._prepared(name, EXPERTS)
        ids_BS = self.ids_BS[:1]
        with context:
            out = model(input_ids=ids_BS, labels=ids_BS, use_cache=False)
        out.loss.backward()
        grads = [p.grad.reshape(-1).float() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return out.logits.detach().float(), torch.cat(grads)

    def ffn_share(self, name: str, rounds: int) -> float:
        """Return the share of a dense step that its FFNs take, forward and backward."""
        shares = []
        with _clocked(layers_of(self.models[name.split()[1]]), self.wait) as seconds:
            for _ in range(rounds + 1):
                seconds.clear()
                begin = time.perf_counter()
                self.step(name)
                self.wait()
                shares.append(sum(seconds) / (time.perf_counter() - begin))
        return statistics.median(shares[1:])


@contextmanager
def _clocked(layers: list[Any], wait: Callable[[], None]) -> Iterator[list[float]]:
    """Within the `with` block every forward and backward pass of a layer adds its seconds to a list."""
    seconds: list[float] = []

    def begin(*_: object) -> None:
        wait()
        seconds.append(-time.perf_counter())

    def end(*_: object) -> None:
        wait()
        seconds.append(time.perf_counter())

    hooks = []
    for layer in layers:
        hooks += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
        hooks += [layer.register_full_backward_pre_hook(begin), layer.register_full_backward_hook(end)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def measure(
    sizes: tuple[int, int, int], precision: str, rounds: int, device: str
) -> dict[str, Any] | list[str]:
    """Return the figures of one model, or what is wrong with its sparse mode."""
    steps = Steps(sizes, precision, device)
    if errors := steps.errors():
        return errors
    names = steps.contenders()
    times = take_turns(
        {name: partial(steps.step, name) for name in names}, 0.0, turns=rounds, wait=steps.wait
    )
    ffns = take_turns({name: partial(steps.ffn, name) for name in names}, 0.0, turns=rounds, wait=steps.wait)

    def best(of: Any, mode: str) -> str:
        return min((name for name in names if name.startswith(mode)), key=of.median)

    dense = best(times, "dense")
    speedup = times.ratio(dense, best(times, "sparse"))
    ffn_speedup = ffns.ratio(best(ffns, "dense"), best(ffns, "sparse"))
    share = steps.ffn_share(dense, rounds)
    bound = 1 / (1 - share + share / ffn_speedup)
    return {
        "ms": {name: 1e3 * seconds for name, seconds in times.medians.items()},
        "ffn_share": share,
        "ffn_speedup": ffn_speedup,
        "step_speedup": speedup,
        "amdahl_bound": bound,
        "step_share_of_amdahl": speedup / bound,
    }


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds: under 50 s in float32, 2 minutes else"
    )
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    keep_freed_memory()
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.precision}")
    figures: dict[str, Any] = {}
    for sizes in SIZES[args.precision, args.quick]:
        found = measure(sizes, args.precision, 5 if args.quick else 9, args.device)
        if isinstance(found, list):
            print("\n".join([*found, "nothing is reported"]), file=sys.stderr)
            return 1
        print(f"\nD={sizes[0]}, {sizes[1]} layers, {sizes[2] * SEQUENCE} tokens")
        for name, ms in found["ms"].items():
            print(f"  {name:20}{ms:9.0f} ms")
        print("  " + ", ".join(f"{key} {value:.2f}" for key, value in found.items() if key != "ms"))
        figures |= {f"{key}_d{sizes[0]}": value for key, value in found.items()}
        figures |= {
            key: found[key] for key in ("step_speedup", "step_share_of_amdahl")
        }  # of the largest model
    print(
        json.dumps(
            {
                "benchmark": "train_step",
                "precision": args.precision,
                "threads": torch.get_num_threads(),
                **figures,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
