"""Which structure lets a router catch most activation mass: weights, co-activation, or both, on a trained model.

    python -m benchmarks.structure RUN [--quick]

RUN is the folder of a finished run of `switchable pretrain`. On validation text that the model has not seen, each
layer's neurons are grouped anew in each way (from scratch), a router is trained for each grouping on one half of the
tokens, and measured on the other half:

    best     share of the activation mass in the best K experts of each token
    caught   share in the K experts that the trained router chooses

`random` groups neurons at random, the floor. The last line is one JSON document with the means over the layers that
are sparse (activation ratio at most the run's limit).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from switchable.cli.flags import default_cache
from switchable.compute.estimate import expert_mass
from switchable.config import objective_of, read_stored
from switchable.data.batches import validation_batches
from switchable.data.objectives import CausalLM
from switchable.data.tokens import prepare
from switchable.errors import InputError
from switchable.ffn.convert import layers_of
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.router import Router, router_loss
from switchable.store.load import load
from switchable.structure.features import features
from switchable.structure.groups import cluster_layers, permutation_from_labels

WAYS = ("random", "weights", "coactivation", "mixed")


@torch.no_grad()
def inputs_of_layers(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Return each FFN's inputs x_TD on the batches."""
    seen: list[list[Tensor]] = [[] for _ in layers_of(model)]
    hooks = [
        layer.register_forward_pre_hook(lambda _m, args, kept=kept: kept.append(args[0].flatten(0, -2)))
        for layer, kept in zip(layers_of(model), seen, strict=True)
    ]
    for ids_BS in batches:
        model(input_ids=ids_BS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept) for kept in seen]


def labels_by(way: str, layer: SwitchableFFN, active_TF: Tensor) -> Tensor:
    """Group a layer's neurons in one way."""
    if way == "random":
        order = torch.randperm(layer.ssd.d_ff, generator=torch.Generator().manual_seed(0))
        return torch.arange(layer.ssd.d_ff)[order] % layer.ssd.num_experts
    rows = features(layer.ssd.reads_FD, active_TF, way)
    return cluster_layers([rows], layer.ssd.num_experts, random_state=0)[0]


def shares(layer: SwitchableFFN, x_TD: Tensor, way: str, steps: int) -> tuple[float, float]:
    """Return (best, caught) on the second half of the tokens, the router trained on the first half."""
    half = len(x_TD) // 2
    with torch.no_grad():
        hidden_TF = layer.ssd.activations(x_TD)
        perm_F = permutation_from_labels(labels_by(way, layer, hidden_TF[:half] != 0), layer.ssd.num_experts)
        mass_TE = expert_mass(hidden_TF[:, perm_F], layer.ssd.weights.down_FD[perm_F], layer.ssd.num_experts)
    router = Router(layer.ssd.d_model, layer.ssd.num_experts)
    router.initialise(layer.ssd.weights.up_FD[perm_F])
    optimizer = torch.optim.AdamW(router.parameters(), lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        picked = torch.randint(0, half, (1024,), generator=generator)
        optimizer.zero_grad()
        router_loss(router(x_TD[picked]), mass_TE[picked]).backward()
        optimizer.step()
    with torch.no_grad():
        held_TE, k = mass_TE[half:], layer.ssd.experts_per_token
        chosen = router(x_TD[half:]).topk(k, dim=-1).indices
        total = held_TE.sum()
        return float(held_TE.topk(k, dim=-1).values.sum() / total), float(
            held_TE.gather(1, chosen).sum() / total
        )


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, e.g. runs/demo")
    parser.add_argument(
        "--quick", action="store_true", help="8,192 tokens and 150 router steps; else 4 times that"
    )
    args = parser.parse_args()
    tokens, steps = (8192, 150) if args.quick else (32_768, 600)
    try:
        model, _ = load(args.run)
        config = read_stored(args.run / "config.yaml")
        data = prepare(config.data, default_cache(), objective=objective_of(config))
    except InputError as error:
        print(f"benchmarks.structure: {error}", file=sys.stderr)
        return 2
    text = validation_batches(data.val.path, CausalLM(config.train.sequence_length), 8, tokens)
    batches = [batch["input_ids"] for batch in text]
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    print(f"{'layer':>5} {'active':>7}  " + "  ".join(f"{way + ' best/caught':>26}" for way in WAYS))
    for i, (layer, x_TD) in enumerate(zip(layers_of(model), inputs_of_layers(model, batches), strict=True)):
        ratio = float((layer.ssd.activations(x_TD) != 0).float().mean())
        row = {way: shares(layer, x_TD, way, steps) for way in WAYS}
        print(
            f"{i:5} {ratio:7.3f}  "
            + "  ".join(f"{best:17.4f} / {caught:.4f}" for best, caught in row.values())
        )
        if ratio <= config.switch.max_activation_ratio:
            for way, values in row.items():
                found[way].append(values)
    if not found["weights"]:
        print("no layer of this run is sparse: nothing to compare", file=sys.stderr)
        return 2
    figures = {"benchmark": "structure", "tokens": tokens, "sparse_layers": len(found["weights"])}
    means = {
        f"mass_{name}_{way}": sum(value[i] for value in values) / len(values)
        for way, values in found.items()
        for i, name in enumerate(("best", "caught"))
    }
    print(json.dumps(figures | means))
    return 0


if __name__ == "__main__":
    sys.exit(main())
