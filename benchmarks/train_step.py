"""A whole optimizer step of a GPT-2 type model in both modes, and what Amdahl's law would allow.

    python -m benchmarks.train_step [--quick]

    bound = t_dense / (t_dense - L · (f_dense - f_sparse)),     share_of_amdahl = (t_dense / t_sparse) / bound

t is a step (forward, backward, AdamW), f one FFN's forward and backward (router included) on the same tokens, L the
number of layers, all of which are sparse here. Everything is timed in turns in one run, after sparse mode with all
experts on has been found equal to dense in logits and gradients. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from benchmarks._models import parity_error, random_gpt2
from switchable.ffn.convert import layers_of, set_mode
from switchable.timing import take_turns

VOCABULARY, SEQUENCE, EXPERTS, K = 8192, 256, 32, 6


def measure(d_model: int, num_layers: int, batch_size: int, rounds: int) -> dict[str, float] | None:
    """Return the figures of one model, or None if the modes disagree."""
    model = random_gpt2(d_model, num_layers, VOCABULARY, SEQUENCE, EXPERTS, K).train()
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(0, VOCABULARY, (batch_size, SEQUENCE), generator=generator)
    if parity_error(model, ids_BS[:1]) > 1e-5:
        return None
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    layer = layers_of(model)[0]
    x_TD = torch.randn(batch_size * SEQUENCE, d_model, generator=generator).requires_grad_()
    dy_TD = torch.randn(batch_size * SEQUENCE, d_model, generator=generator)

    def step(mode: str) -> None:
        set_mode(model, mode)
        model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def ffn(mode: str) -> None:
        layer.ssd.mode = mode
        layer(x_TD).backward(dy_TD)
        layer.zero_grad()
        x_TD.grad = None

    seconds = take_turns(
        {
            "dense": lambda: step("dense"),
            "sparse": lambda: step("sparse"),
            "ffn_dense": lambda: ffn("dense"),
            "ffn_sparse": lambda: ffn("sparse"),
        },
        0.0,
        turns=rounds,
    ).medians
    saved = num_layers * (seconds["ffn_dense"] - seconds["ffn_sparse"])
    speedup = seconds["dense"] / seconds["sparse"]
    bound = seconds["dense"] / (seconds["dense"] - saved)
    return {
        "ffn_speedup": seconds["ffn_dense"] / seconds["ffn_sparse"],
        "step_speedup": speedup,
        "amdahl_bound": bound,
        "step_share_of_amdahl": speedup / bound,
    }


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="D=768 and D=256 with few rounds (under 50 s)")
    quick = parser.parse_args().quick
    shapes = [(256, 4, 16), (768, 2, 8)] if quick else [(256, 4, 16), (512, 4, 16), (768, 4, 16)]
    print(f"{'D':>5} {'layers':>6} {'tokens':>6} {'FFN':>7} {'step':>7} {'Amdahl':>7} {'share':>7}")
    figures: dict[str, float] = {}
    for d_model, num_layers, batch_size in shapes:
        found = measure(d_model, num_layers, batch_size, rounds=5 if quick else 15)
        if found is None:
            print(
                "sparse mode with all experts on differs from dense mode: nothing is reported",
                file=sys.stderr,
            )
            return 1
        shown = " ".join(f"{value:6.2f}x" for value in list(found.values())[:3])
        print(
            f"{d_model:5} {num_layers:6} {batch_size * SEQUENCE:6} {shown} {found['step_share_of_amdahl']:6.1%}"
        )
        figures |= {f"{key}_d{d_model}": value for key, value in found.items()}
        figures |= {
            key: found[key] for key in ("step_speedup", "step_share_of_amdahl")
        }  # of the largest model
    print(json.dumps({"benchmark": "train_step", "threads": torch.get_num_threads(), **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
