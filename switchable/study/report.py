"""report.html: one file that opens anywhere, without network, with everything in it.

It opens with what was found; then the pictures (images whose points tell their values), a slider for K, tables, the
configuration and the versions. Everything that comes from outside (names, settings, messages) is escaped by the
template, or set as text by the script.

    write_report(study, path)         from any study
    write_run_report(folder)          from what a run has recorded itself
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jinja2

from switchable.files import write_text
from switchable.store.rundir import RunDir
from switchable.study.canvas import draw_picture, embedded
from switchable.study.findings import findings
from switchable.study.measures import LayerStudy
from switchable.study.pictures import PictureOf, draw_curves, pictures_of, shown_layers
from switchable.study.result import LayerShape, Study, mean
from switchable.study.study import records_of_run
from switchable.train.summary import FIGURES


def write_report(study: Study, path: Path) -> None:
    """Write the report of a study, completely or not at all."""
    points: dict[str, Any] = {}
    figures = [_figure(picture, points) for picture in pictures_of(study)]
    mass = _mass(study)
    names = {i: layer.name for i, layer in enumerate(study.layers)}
    chosen = shown_layers(study) if any(figure["per_layer"] for figure in figures) else []
    templates = jinja2.PackageLoader("switchable.study", "page")
    environment = jinja2.Environment(loader=templates, autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template("report.html.jinja").render(
        title=study.title,
        findings=findings(study),
        problems=study.problems,
        notes=study.notes,
        figures=figures,
        layers_shown=[{"number": i, "name": names.get(i, "")} for i in chosen],
        has_mean=any(image["layer"] == "mean" for figure in figures for image in figure["images"]),
        mass=mass,
        tables=list(_tables(study)),
        data={"points": points, "mass": mass["curves"] if mass else []},
    )
    write_text(path, page)


def write_run_report(folder: Path) -> Path:
    """Write `report.html` and `curves.png` into a run's folder, from what the run has recorded itself.

    It measures nothing and is a matter of seconds.

    Raises:
        InputError: the folder is not a run.
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
    write_report(study, run.report)
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


def _mass(study: Study) -> dict[str, Any] | None:
    if not study.results:
        return None
    return {
        "k": study.layers[-1].experts_per_token,
        "experts": study.layers[0].num_experts,
        "rows": [{"name": f"{i} ({layer.name})"} for i, layer in enumerate(study.layers)],
        "curves": [
            [[round(share, 5) for share in curve] for curve in (r.mass_router, r.mass_best, r.mass_random)]
            for r in study.results[-1]
        ],
    }


def _tables(study: Study) -> Iterable[dict[str, Any]]:
    if study.results:
        yield _layer_table(study)
    if len(study.steps) > 1:
        yield _step_table(study)
    for title, values in (
        ("The run's figures", study.summary),
        ("Probe", study.probe),
        ("Configuration", study.config),
        ("Versions", study.versions),
    ):
        if values:
            units = FIGURES if values is study.summary else {}
            rows = [
                [key, f"{_text(value)} {units[key]['unit'] if key in units else ''}".rstrip()]
                for key, value in values.items()
                if not isinstance(value, dict)
            ]
            yield {"title": title, "head": ["", ""], "rows": rows, "caption": ""}


def _layer_table(study: Study) -> dict[str, Any]:
    at = f" at step {study.steps[-1]:,}" if len(study.steps) > 1 else ""
    columns: dict[str, Callable[[int, LayerShape, LayerStudy], str]] = {
        "layer": lambda i, shape, _: f"{i} ({shape.name})",
        "neurons": lambda _, shape, __: f"{shape.d_ff:,}",
        "active per token": lambda _, __, r: _share(r.activation_ratio),
        "needed for 99 %": lambda _, __, r: _share(r.needed),
        "dead": lambda _, __, r: _share(r.dead),
        "always on": lambda _, __, r: _share(r.always_on),
        "K": lambda _, shape, __: f"{shape.experts_per_token} of {shape.num_experts}",
        "mass in router's K": lambda i, _, __: _share(study.mass_at_k("router", i)),
        "in best K": lambda i, _, __: _share(study.mass_at_k("best", i)),
        "busiest / mean load": lambda _, __, r: f"{r.load_imbalance:.2f}",
    }
    layers = zip(range(study.num_layers), study.layers, study.results[-1], strict=True)
    caption = "Shares of neurons, and of the activation mass. The measures are defined in docs/measures.md."
    return _table(f"The layers{at}", columns, layers, caption)


def _step_table(study: Study) -> dict[str, Any]:
    before = study.mean_pairs("pattern").diagonal(offset=1).tolist() if study.pairs else []
    columns: dict[str, Callable[[int, list[LayerStudy]], str]] = {
        "step": lambda n, _: f"{study.steps[n]:,}",
        "active per token": lambda _, layers: _share(mean([r.activation_ratio for r in layers])),
        "dead": lambda _, layers: _share(mean([r.dead for r in layers])),
        "mass in router's K": lambda n, layers: _share(
            mean([study.mass_at_k("router", i, n) for i in range(len(layers))])
        ),
        "busiest / mean load": lambda _, layers: f"{mean([r.load_imbalance for r in layers]):.2f}",
        "Jaccard with the one before": lambda n, _: f"{before[n - 1]:.3f}" if n and before else "",
        "tokens with other experts": lambda n, _: (
            _share(mean([tokens for tokens, _ in study.changes[n - 1]])) if n and study.changes else ""
        ),
    }
    return _table("The checkpoints, mean over layers", columns, enumerate(study.results))


def _table(
    title: str, columns: dict[str, Callable[..., str]], rows: Iterable[Any], caption: str = ""
) -> dict[str, Any]:
    """Return a table as the page shows it; a column is a function of what a row is about."""
    cells = [[cell(*row) for cell in columns.values()] for row in rows]
    return {"title": title, "head": list(columns), "rows": cells, "caption": caption}


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(v) for v in value) or "none"
    return "none" if value is None else str(value)
