"""Which recipe loses least and saves most: one question at a time, each variant against dense training.

    python -m experiments.recipe QUESTION [--data TEXT ...] [--out DIR] [--seeds 0 1] [--steps N]
    python -m experiments.recipe --list

A question is a few variants of one small configuration (recipe.yaml), each a handful of changed settings. All are
trained on the same text in the same order from the same weights, and compared with a dense run that differs in
nothing but the recipe:

    delta dense, delta sparse    validation loss in either mode minus that of the dense run (nats per token)
    FLOPs                        without embeddings and head, over the dense run's
    steps                        share of the steps that were sparse
    experts                      mean share of its experts that a layer computes in sparse mode, dense layers being 1

Runs are ordinary run folders named after their settings. What is finished is not trained again, what was interrupted
goes on, and questions share the runs they have in common. The last line is one JSON document. Findings:
docs/log/quality.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switchable.cli.flags import default_cache
from switchable.config import RunConfig, from_dict, read_yaml, to_dict
from switchable.errors import InputError
from switchable.recipes import RECIPES

Settings = Mapping[str, Any]
LATE: Settings = {"min_dense_fraction": 0.8, "sparse_steps": 3, "final_dense_fraction": 0.0}
RECIPE_LATE: Settings = RECIPES["late"] | {"recipe": "late", "num_experts": 64, "experts_per_token": 10}

LONGEST_NAME = 200
"""Characters; file systems take 255 bytes, and something may be put before a name for a while."""

QUESTIONS: dict[str, dict[str, Settings]] = {
    "interleave": {
        "one dense step in 2": {"sparse_steps": 1},
        "one in 4": {"sparse_steps": 3},
        "one in 8": {},
        "one in 16": {"sparse_steps": 15},
    },
    "router": {
        "learned on half the tokens": {},
        "on all of them": {"router_token_fraction": 1.0},
        "slower": {"router_learning_rate": 1e-3},
        "faster": {"router_learning_rate": 3e-2},
    },
    "experts": {
        "4 of 32": {},
        "2 of 32": {"experts_per_token": 2},
        "8 of 32": {"experts_per_token": 8},
        "2 of 16": {"num_experts": 16, "experts_per_token": 2},
        "8 of 64": {"num_experts": 64, "experts_per_token": 8},
        "16 of 128": {"num_experts": 128, "experts_per_token": 16},
    },
    "mass": {
        "K = 4 in every layer": {},
        "90 % of the mass": {"mass_target": 0.9},
        "95 %": {"mass_target": 0.95},
        "80 %, the first layer too": {"mass_target": 0.8},
    },
    "start": {
        "10 % dense": {},
        "10 %, patterns 0.5 alike": {"stability_threshold": 0.5},
        "5 %, alike or not": {"min_dense_fraction": 0.05, "stability_threshold": 0.0},
        "10 %, with half the mass caught": {"min_mass_caught": 0.5},
        "30 %": {"min_dense_fraction": 0.3},
    },
    "late": {
        "from 10 % on, 7 to 1": {},
        "from 60 %, 1 to 1": {"min_dense_fraction": 0.6, "sparse_steps": 1},
        "from 60 %, 3 to 1": {"min_dense_fraction": 0.6, "sparse_steps": 3},
        "from 80 %, 3 to 1": LATE,
        "the same, 89 % of the mass": LATE | {"mass_target": 0.89},
        "the recipe late": RECIPE_LATE,
    },
    "depth": {
        "late, 4 layers": RECIPE_LATE,
        "8 layers": RECIPE_LATE | {"num_layers": 8},
        "12 layers": RECIPE_LATE | {"num_layers": 12},
    },
    "end": {
        "last 5 % dense": {},
        "none": {"final_dense_fraction": 0.0},
        "10 %": {"final_dense_fraction": 0.1},
        "30 %": {"final_dense_fraction": 0.3},
    },
    "penalty": {
        "none": {},
        "1e-5": {"activation_l1": 1e-5},
        "3e-5": {"activation_l1": 3e-5},
        "1e-4": {"activation_l1": 1e-4},
        "1e-3": {"activation_l1": 1e-3},
    },
    "activation": {"ReLU^2": {}, "ReLU": {"activation": "relu"}},
    "learning rate": {
        "2e-3": {},
        "1.4e-3": {"learning_rate": 1.4e-3},
        "3e-3": {"learning_rate": 3e-3},
        "5e-3": {"learning_rate": 5e-3},
    },
    "longer": {"as long": {}, "a quarter longer": {"steps": 1.25}, "half as long again": {"steps": 1.5}},
}
"""Question -> variant -> settings that differ from recipe.yaml. `steps` is a factor."""

DENSE: Settings = {"recipe": "dense", "min_dense_fraction": 1.0, "active_below": 0.0}
WITH_THE_MODEL = ("activation", "learning_rate", "num_layers")
"""Settings that the dense run a variant is compared with has too."""


def configure(base: RunConfig, settings: Settings, seed: int) -> RunConfig:
    """Return the base configuration with some settings changed, whatever their section."""
    values: dict[str, Any] = {section: dict(entries) for section, entries in to_dict(base).items()}
    changes = {**settings, "seed": seed}
    if "steps" in changes:
        changes["steps"] = round(changes["steps"] * base.train.steps)
    for entries in values.values():
        entries.update({name: value for name, value in changes.items() if name in entries})
    return from_dict(values, "the experiment")


def run(base: RunConfig, settings: Settings, seed: int, out: Path, cache: Path) -> dict[str, Any]:
    """Train a variant unless it is trained, and return its summary."""
    from switchable.store.rundir import RunDir
    from switchable.train.pretrain import pretrain, resume

    folder = out / folder_name(settings, seed)
    rundir = RunDir(folder)
    if not rundir.summary.exists():
        if rundir.config.exists() and rundir.steps():
            resume(folder, {}, cache, quiet=True)
        else:
            pretrain(configure(base, settings, seed), folder, cache, overwrite=True, quiet=True)
    summary: dict[str, Any] = json.loads(rundir.summary.read_text(encoding="utf-8"))
    return summary


def folder_name(settings: Settings, seed: int) -> str:
    """Return the name of a variant's run folder: its settings, cut where a file system would refuse them."""
    parts = [f"{name}={value}" for name, value in sorted(settings.items())] or ["default"]
    name = "_".join([*parts, f"s{seed}"])
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: LONGEST_NAME - len(digest) - 1]}_{digest}"


def compare(summary: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the figures of one variant against its dense run, one seed."""
    sparse = summary["val_loss_sparse"]
    return {
        "delta_dense": summary["val_loss_dense"] - dense["val_loss_dense"],
        "delta_sparse": None if sparse is None else sparse - dense["val_loss_dense"],
        "flops_ratio_nonembedding": summary["flops_nonembedding"] / dense["flops_nonembedding"],
        "sparse_fraction": summary["sparse_fraction"],
        "expert_fraction": expert_fraction(summary),
    }


def expert_fraction(summary: Mapping[str, Any]) -> float:
    """Return the mean share of its experts that a layer computes in sparse mode, dense layers being 1."""
    parts = zip(summary["sparse_layers"], summary["experts_per_token"], strict=True)
    return statistics.fmean(k / summary["experts"]["num_experts"] if part else 1.0 for part, k in parts)


def ask(question: str, base: RunConfig, seeds: list[int], out: Path, cache: Path) -> dict[str, Any]:
    """Train what a question needs; return variant -> figure -> mean over the seeds (None if a seed has none)."""
    answers: dict[str, Any] = {}
    for variant, settings in QUESTIONS[question].items():
        baseline = DENSE | {name: settings[name] for name in WITH_THE_MODEL if name in settings}
        rows = []
        for seed in seeds:
            dense = run(base, baseline, seed, out, cache)
            rows.append(compare(run(base, settings, seed, out, cache), dense))
        answers[variant] = {
            figure: None
            if any(row[figure] is None for row in rows)
            else statistics.fmean(row[figure] for row in rows)  # type: ignore[misc]
            for figure in rows[0]
        }
        print(line(variant, answers[variant]), flush=True)
    return answers


def line(variant: str, figures: Mapping[str, float | None]) -> str:
    """Return a row of the table."""
    forms = ("+10.4f", "+10.4f", "10.3f", "10.1%", "10.1%")
    cells = [
        " " * 9 + "—" if v is None else f"{v:{form}}" for v, form in zip(figures.values(), forms, strict=True)
    ]
    return f"{variant:30}" + "".join(cells)


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "question", nargs="?", choices=QUESTIONS, metavar="QUESTION", help=", ".join(QUESTIONS)
    )
    parser.add_argument("--list", action="store_true", help="show the questions and their variants")
    parser.add_argument("--data", nargs="+", default=[], help="text, as for switchable pretrain")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"), help="folder (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: those of recipe.yaml")
    args = parser.parse_args()
    if args.list or args.question is None:
        for question, variants in QUESTIONS.items():
            print(f"{question}: {'; '.join(variants)}")
        return 0
    try:
        base = from_dict(read_yaml(Path(__file__).with_name("recipe.yaml")), "recipe.yaml")
        base = dataclasses.replace(base, data=dataclasses.replace(base.data, data=tuple(args.data)))
        if args.steps:
            base = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=args.steps))
        heads = ("delta dense", "sparse", "FLOPs", "steps", "experts")
        print(
            f"{args.question:30}" + "".join(f"{head:>{12 if i == 0 else 10}}" for i, head in enumerate(heads))
        )
        answers = ask(args.question, base, args.seeds, args.out, default_cache())
    except InputError as error:
        print(f"recipe: {error}", file=sys.stderr)
        return 2
    print(
        json.dumps(
            {"experiment": "recipe", "question": args.question, "seeds": args.seeds, "variants": answers}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
