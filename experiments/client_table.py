"""The table of docs/families.md that `python -m experiments.clients --models --write-table` writes from its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/2026-11-29-models-by-structure.json"
DOCS = ROOT / "docs/families.md"
LEFT = "left alone"
"""How the reason of a class begins in which not all that looks like an FFN is switchable."""
BEGIN, END = "<!-- by python -m experiments.clients --models --write-table -->", "<!-- end of the table -->"
TITLES = {
    "works": "works, in part",
    "refused": "refused",
    "WRONG": "wrong",
    "mixture": "a mixture of experts, refused",
    "no ReLU": "no ReLU can be asked for, or no FFN",
    "cannot build": "not tried: no tiny model could be built",
}
"""What the verdicts are called; `works` without a reason is all that is said of most."""


def write_table(results: Mapping[str, Any], path: Path = DOCS) -> None:
    """Put the table between its two lines."""
    path.write_text(with_table(path.read_text(encoding="utf-8"), results), encoding="utf-8")


def with_table(text: str, results: Mapping[str, Any]) -> str:
    """Return a text with the table between its two lines."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def table(results: Mapping[str, Any]) -> str:
    """Return the table: what works by form, and everything else with its reason."""
    return "\n".join(_lines(results))


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    counts, models = results["counts"], results["models"]
    works = [model for model in models if model["verdict"] == "works"]
    share = counts["share_working"]
    tried = round(len(works) / share) if share else 0
    version = results["transformers"]
    yield f"{len(works)} of {tried} classes work ({100 * (share or 0):.0f} %), with transformers {version}:"
    yield ""
    yield "| FFN | classes |"
    yield "|---|---|"
    for form in sorted({model["form"] for model in works}):
        yield f"| {form} | {', '.join(m['model'] for m in works if m['form'] == form)} |"
    yield ""
    yield "| the others | why |"
    yield "|---|---|"
    for verdict, title in TITLES.items():
        reasons: dict[str, list[str]] = {}
        for model in models:
            if model["verdict"] == verdict and (verdict != "works" or model["why"].startswith(LEFT)):
                reasons.setdefault(_short(model["why"]), []).append(model["model"])
        for why, names in reasons.items():
            yield f"| {', '.join(names)} | {title}: {why} |"


def _short(why: str) -> str:
    """Return the first sentence of a reason, in a form that a table can hold."""
    first = why.split(". ")[0].split("; ")[0]
    return first.replace("|", "\\|").replace("<", "&lt;")[:160]
