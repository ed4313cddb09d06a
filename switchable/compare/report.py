"""One table of a comparison: `compare.json` (everything), `compare.md` (to read), `compare.png` (the picture).

It covers every finished run of the comparison that is in the folder, whoever trained it and when.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from switchable.compare.figures import (
    OWN,
    Validation,
    curve,
    gain_at_equal_flops,
    over_seeds,
    own_figures,
    paired_figures,
)
from switchable.compare.methods import in_order, named
from switchable.compare.picture import draw_comparison
from switchable.compare.runs import Run
from switchable.errors import InputError
from switchable.files import read_records, write_json, write_text
from switchable.train.figures import label

GAIN = "gain_of_ssd_at_equal_flops"

ROWS: dict[str, tuple[str, str]] = {
    "val_loss_dense": (label("val_loss_dense"), ".4f"),
    "val_loss_sparse": (label("val_loss_sparse"), ".4f"),
    "bits_per_byte_dense": (label("bits_per_byte_dense"), ".4f"),
    "bits_per_byte_sparse": (label("bits_per_byte_sparse"), ".4f"),
    "delta_dense": ("dense mode - dense's loss (nats)", "+.4f"),
    "delta_sparse": ("sparse mode - dense's loss (nats)", "+.4f"),
    "sparse_fraction": (label("sparse_fraction"), ".3f"),
    "expert_fraction": ("K/E in sparse mode, mean over layers (dense ones: 1)", ".3f"),
    "flops": (label("flops"), ".3g"),
    "flops_ratio": ("FLOPs / dense's", ".3f"),
    "flops_ratio_nonembedding": ("FLOPs without embeddings and head / dense's", ".3f"),
    "wall_seconds": (label("wall_seconds_train"), ".0f"),
    "wall_ratio": ("wall-clock / dense's", ".3f"),
    "cpu_seconds": (label("cpu_seconds_train"), ".0f"),
    "cpu_ratio": ("CPU time / dense's", ".3f"),
    "time_to_dense_loss_ratio": ("time to dense's final loss / dense's", ".3f"),
    "cpu_to_dense_loss_ratio": ("CPU time to dense's final loss / dense's", ".3f"),
    "loss_at_dense_time": ("loss at dense's time", ".4f"),
    "flops_to_dense_loss_ratio": ("FLOPs to dense's final loss / dense's", ".3f"),
    "loss_at_dense_flops": ("loss at dense's FLOPs", ".4f"),
    GAIN: ("ssd's loss below this one's at equal FLOPs (nats)", "+.4f"),
}
"""Figure -> how its row is called, and its format."""
PAIRED = tuple(name for name in ROWS if name not in (*OWN, GAIN))
"""Figures of a run against the dense run of its seed."""

HEADLINE = (
    "delta_dense", "delta_sparse", "flops_ratio", "flops_ratio_nonembedding", "wall_ratio", "time_to_dense_loss_ratio",
)  # fmt: skip
"""Figures of `ssd` that the last line of output starts with."""


def write_report(runs: Sequence[Run], out: Path) -> dict[str, Any]:
    """Write the table of finished runs in all three forms; return what `compare.json` holds.

    Raises InputError if a summary is damaged or the record of a run is gone.
    """
    summaries = {(run.method, run.seed): run.summary() for run in runs}
    try:
        curves = {(run.method, run.seed): curve(read_records(run.path / "metrics.jsonl")) for run in runs}
    except FileNotFoundError as gone:
        raise InputError(f"{gone.filename} is gone; remove the run's folder and start again") from None
    table = tabulate(summaries, curves)
    write_json(out / "compare.json", table)
    write_text(out / "compare.md", markdown(table))
    draw_comparison(curves, out / "compare.png")
    return table


def tabulate(
    summaries: Mapping[tuple[str, int], Mapping[str, Any]],
    curves: Mapping[tuple[str, int], Sequence[Validation]],
) -> dict[str, Any]:
    """Return the table, method -> figure -> mean, spread and value per seed, from each run's summary and curve."""
    methods: dict[str, Any] = {}
    for method in in_order({name for name, _ in summaries}):
        seeds = sorted(seed for name, seed in summaries if name == method)
        own = {seed: own_figures(summaries[method, seed]) for seed in seeds}
        paired = {
            seed: paired_figures(own[seed], curves[method, seed], own_figures(dense), curves["dense", seed])
            for seed in seeds
            if (dense := summaries.get(("dense", seed))) is not None
        }
        gains = {
            seed: gain_at_equal_flops(curves["ssd", seed], curves[method, seed])
            for seed in seeds
            if method != "ssd" and ("ssd", seed) in summaries
        }
        methods[method] = {
            "seeds": seeds,
            **{name: over_seeds({seed: values[name] for seed, values in own.items()}) for name in OWN},
            **{name: over_seeds({seed: values[name] for seed, values in paired.items()}) for name in PAIRED},
            GAIN: over_seeds(gains),
            "why_dense": {seed: why for seed in seeds if (why := _why_dense(summaries[method, seed]))},
            "ended_before_dense": _ended_before_dense(method, seeds, curves),
            "ran_with": _distinct([how for seed in seeds for how in summaries[method, seed]["ran_with"]]),
        }
    return {"methods": methods, "warnings": warnings(methods)}


def warnings(methods: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the table must know."""
    said = []
    if "dense" not in methods:
        said.append("there is no finished dense run to compare with, so there are no ratios")
    else:
        for name, found in methods.items():
            if lacking := [seed for seed in found["seeds"] if seed not in methods["dense"]["seeds"]]:
                alone = f"{name} has seeds without a dense run ({_list(lacking)})"
                said.append(f"{alone}; its ratios leave them out")
    for name, found in methods.items():
        for seed, why in found.get("why_dense", {}).items():
            said.append(f"{name}, seed {seed}, has no sparse mode: {why}")
    if len(_distinct([how for found in methods.values() for how in found["ran_with"]])) > 1:
        how = "{threads} threads on {device}, {jobs} at a time".format_map
        shown = "; ".join(
            f"{name}: {_list(map(how, found['ran_with'])) or 'unknown'}" for name, found in methods.items()
        )
        said.append(f"wall-clock is not comparable, the runs shared the machine differently: {shown}")
    return said


def _why_dense(summary: Mapping[str, Any]) -> str | None:
    """Say why a run that was to become sparse did not; None if it did, or was not to."""
    asked = summary["experts"].get("min_dense_fraction") != 1
    return summary.get("why_dense") if asked and not any(summary["sparse_layers"]) else None


def markdown(table: Mapping[str, Any]) -> str:
    """Return the table to read: a row per figure, a column per method."""
    methods = table["methods"]
    lines = [*(f"- {said}" for said in sentences({**table, "warnings": []})), ""]
    lines += ["| | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    lines.append("| seeds | " + " | ".join(_list(found["seeds"]) for found in methods.values()) + " |")
    for figure, (name, form) in ROWS.items():
        sooner = [bool(found["ended_before_dense"].get(figure)) for found in methods.values()]
        rows = zip(methods.values(), sooner, strict=True)
        cells = [_cell(found[figure], form, " \\*" if marked else "") for found, marked in rows]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    notes = ["Mean over seeds ± standard deviation; — where there is no value."]
    early = [name for name, found in methods.items() if any(found["ended_before_dense"].values())]
    if early:
        notes.append(f"\\* ended with less than dense's (the final loss is shown): {', '.join(early)}.")
    notes += [f"Note: {warning}." for warning in table["warnings"]]
    methods_list = "\n".join(f"- `{name}`: {named(name).summary}" for name in methods)
    return "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n\n" + methods_list + "\n"


SAID = {
    "delta_dense": "loss {:+.4f} nats in dense mode",
    "delta_sparse": "{:+.4f} in sparse mode",
    "flops_ratio_nonembedding": "{:.3f} of the FLOPs without embeddings and head",
    "wall_ratio": "{:.3f} of the wall-clock",
}
"""Figures of a method in its closing sentence."""


def sentences(table: Mapping[str, Any]) -> list[str]:
    """Return a closing sentence for every method that has a dense run to be compared with."""
    said = []
    for name, found in table["methods"].items():
        means = [(form, found[key]["mean"]) for key, form in SAID.items()]
        parts = [form.format(mean) for form, mean in means if mean is not None]
        if name != "dense" and parts:
            said.append(f"{name} against dense, seeds {_list(found['seeds'])}: {', '.join(parts)}.")
    return said + [f"{warning}." for warning in table["warnings"]]


def headline(table: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Return the comparison's closing figures: ssd's headline ones, then every method's means."""
    names = (*OWN, *PAIRED, GAIN)
    methods = table["methods"].items()
    means = {method: {name: found[name]["mean"] for name in names} for method, found in methods}
    first = {name: means.get("ssd", {}).get(name) for name in HEADLINE}
    rest = {"methods": means, "warnings": table["warnings"], "table": str(out / "compare.json")}
    return first | rest


def _ended_before_dense(
    method: str, seeds: Sequence[int], curves: Mapping[tuple[str, int], Sequence[Validation]]
) -> dict[str, bool]:
    """Say along which axis the runs ended before the dense ones did, in any seed."""
    pairs = [(curves[method, seed], curves["dense", seed]) for seed in seeds if ("dense", seed) in curves]
    return {
        "loss_at_dense_time": any(own[-1].seconds < dense[-1].seconds for own, dense in pairs),
        "loss_at_dense_flops": any(own[-1].flops < dense[-1].flops for own, dense in pairs),
    }


def _cell(value: Mapping[str, Any], form: str, mark: str) -> str:
    mean, spread = value["mean"], value["spread"]
    if mean is None:
        reached = [v for v in value["per_seed"].values() if v is not None]
        return f"— ({len(reached)} of {len(value['per_seed'])})" if reached else "—"
    shown = f"{mean:{form}}"
    return shown + ("" if spread is None else f" ± {spread:{form.lstrip('+')}}") + mark


def _list(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


def _distinct(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for item in items:
        if dict(item) not in found:
            found.append(dict(item))
    return found
