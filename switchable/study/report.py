"""report.html: one file that opens anywhere, without network, with everything in it.

It opens with a headline and what was found; then the pictures (images whose points tell their values) and tables;
configuration and versions are folded away. Everything that comes from outside (names, settings, messages) is escaped
by the template, or set as text by the script.

    write_report(study, path)         from any study
    write_run_report(folder)          from what a run has recorded itself
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2

from switchable.files import write_text
from switchable.store.rundir import RunDir
from switchable.study.canvas import draw_picture, embedded
from switchable.study.findings import findings, headline, spread
from switchable.study.pictures import PictureOf, draw_curves, pictures_of, shown_layers
from switchable.study.result import Study
from switchable.study.study import records_of_run
from switchable.train.figures import FIGURES


def write_report(study: Study, path: Path, heading: str = "Activation study") -> None:
    """Write the report of a study, completely or not at all."""
    points: dict[str, Any] = {}
    figures = [_figure(picture, points) for picture in pictures_of(study)]
    chosen = shown_layers(study) if any(figure["per_layer"] for figure in figures) else []
    templates = jinja2.PackageLoader("switchable.study", "page")
    environment = jinja2.Environment(loader=templates, autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template("report.html.jinja").render(
        heading=heading,
        title=study.title,
        headline=headline(study),
        findings=findings(study),
        problems=study.problems,
        notes=study.notes,
        figures=figures,
        layers_shown=[{"number": i, "name": study.layers[i].name} for i in chosen],
        has_mean=bool(study.pairs),
        regrouped=bool(study.regroupings()),
        tables=list(_tables(study)),
        data={"points": points},
    )
    write_text(path, page)


def write_run_report(folder: Path) -> Path:
    """Write `report.html` and `curves.png` into a run's folder, from what the run has recorded itself, in seconds.

    Raises InputError if the folder is not a run's.
    """
    study = records_of_run(folder)
    study.notes.append(
        "Measured during training, on the probe. `switchable study` on this run compares its checkpoints with one "
        "another and shows more."
    )
    if study.summary.get("why_dense"):
        study.notes.append(f"Sparse mode at the end: {study.summary['why_dense']}.")
    run = RunDir(folder)
    draw_curves(study, run.curves)
    write_report(study, run.report, "Training run")
    return run.report


def _figure(picture: PictureOf, points: dict[str, Any]) -> dict[str, Any]:
    """Return a picture as the page shows it: one image per layer, or one with all its panels."""
    per_layer = picture.per_layer
    parts = [(layer, [draw]) for layer, draw in picture.panels] if per_layer else [(None, picture.draws)]
    images = []
    for i, (layer, draws) in enumerate(parts):
        image = embedded(draw_picture(draws))
        key = f"{picture.name}-{i}"
        points[key] = image.pop("points")
        name = "" if not per_layer else "mean" if layer is None else str(layer)
        images.append({**image, "key": key, "layer": name, "hidden": i > 0})
    facts = {name: getattr(picture, name) for name in ("name", "title", "caption", "per_layer")}
    return {**facts, "images": images}


def _tables(study: Study) -> Iterable[dict[str, Any]]:
    if study.records("change"):
        yield _change_table(study)
    if study.results:
        yield _layer_table(study)
    if len(study.steps) > 1:
        yield _step_table(study)
    if study.summary:
        rows = [_figure_row(*item) for item in study.summary.items()]
        yield {"title": "The run's figures", "head": [], "rows": rows, "caption": "", "folded": False}
    for title, values in (
        ("Probe", study.probe), ("Configuration", study.config), ("Versions", study.versions),
    ):  # fmt: skip
        if values:
            rows = [[key, _text(value)] for key, value in values.items()]
            yield {"title": title, "head": [], "rows": rows, "caption": "", "folded": True}


def _figure_row(key: str, value: Any) -> list[str]:
    known = FIGURES.get(key, {"name": key, "unit": ""})
    return [str(known["name"]), _text(value) if value is None else f"{_text(value)} {known['unit']}"]


def _change_table(study: Study) -> dict[str, Any]:
    names = ("step", "layer", "from", "to", "why")
    rows = [{name: _text(change[name]) for name in names} for change in study.records("change")]
    caption = (
        "What was measured before each change. Milliseconds are of one layer's ways to multiply, forward and backward, "
        "timed when the run started. A layer that is sparse is so in most steps from then on."
    )
    return _table("What layers changed, and why", rows, caption) | {"folded": len(rows) > 24}


def _layer_table(study: Study) -> dict[str, Any]:
    at = f" at step {study.steps[-1]:,}" if len(study.steps) > 1 else ""
    rows = [
        {
            "layer": f"{i} ({shape.name})",
            "neurons": f"{shape.d_ff:,}",
            "active per token": _share(r.activation_ratio),
            "needed for 99 %": _share(r.needed),
            "dead": _share(r.dead),
            "always on": _share(r.always_on),
            "K": f"{r.experts_per_token} of {shape.num_experts}{'' if r.takes_part else ' (dense)'}",
            "mass in router's K": _share(r.mass_caught),
            "in best K": _share(r.mass_best_k),
            "busiest / mean load": f"{r.load_imbalance:.2f}",
        }
        for i, (shape, r) in enumerate(zip(study.layers, study.results[-1], strict=True))
    ]
    caption = (
        "Shares of neurons, and of the activation mass. A layer marked dense takes no part in sparse mode. The "
        "measures are defined in docs/measures.md."
    )
    return _table(f"The layers{at}", rows, caption)


def _step_table(study: Study) -> dict[str, Any]:
    before = study.mean_pairs("pattern").diagonal(offset=1).tolist() if study.pairs else []
    rows = [
        {
            "step": f"{study.steps[n]:,}",
            "active per token": _share(fmean([r.activation_ratio for r in layers])),
            "dead": _share(fmean([r.dead for r in layers])),
            "K": spread([r.experts_per_token for r in layers]),
            "mass in router's K": _share(fmean([r.mass_caught for r in layers])),
            "busiest / mean load": f"{fmean([r.load_imbalance for r in layers]):.2f}",
            "Jaccard with the one before": f"{before[n - 1]:.3f}" if n and before else "",
        }
        for n, layers in enumerate(study.results)
    ]
    return _table("The checkpoints, mean over layers", rows)


def _table(title: str, rows: list[dict[str, str]], caption: str = "") -> dict[str, Any]:
    """Return a table as the page shows it, of its rows by column."""
    cells = [list(row.values()) for row in rows]
    return {"title": title, "head": list(rows[0]), "rows": cells, "caption": caption, "folded": False}


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(each)}" for key, each in value.items())
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(v) for v in value) or "none"
    return "none" if value is None else str(value)
