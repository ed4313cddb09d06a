"""`switchable recipes`: the tables of settings that runs start from, side by side."""

from __future__ import annotations

import argparse
import dataclasses

from switchable.files import as_json

HELP = "show the recipes: all settings of switching, side by side"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print one JSON document instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    from switchable.recipes import LEAST_NEURONS, PENALISED, RECIPES, TILE_NEURONS
    from switchable.settings import SwitchConfig

    if args.json:
        print(as_json({"recipes": RECIPES}))
        return 0
    helps = {f.name: f.metadata["help"] for f in dataclasses.fields(SwitchConfig)}
    print(f"{'setting':24}" + "".join(f"{name:>9}" for name in RECIPES) + "   what it is")
    for name in RECIPES["early"]:
        cells = "".join(f"{_cell(table[name]):>9}" for table in RECIPES.values())
        print(f"{name:24}{cells}   {helps[name]}")
    print(
        f"\nnum_experts is the most: experts get at least {LEAST_NEURONS} neurons, {TILE_NEURONS} where bfloat16 is "
        "multiplied by tiles (AMX, GPUs). experts_per_token keeps its share.\n"
        f"activation_l1 is for {PENALISED}; others get 0. In bfloat16 it is paid from a tenth of the run on.\n"
        "With auto, what a run measures at its start also decides (docs/method.md)."
    )
    return 0


def _cell(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
