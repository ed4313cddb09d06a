"""A run's own records: what is shaded, and that its picture is drawn from metrics of any length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.image import imread

from switchable.files import read_records
from switchable.study.canvas import Picture, draw_picture
from switchable.study.findings import findings, headline
from switchable.study.pictures import draw_curves, pictures_of
from switchable.study.result import Study, sparse_spans


def line(step: int, share: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "sparse_fraction": share, "loss": 5.0 / step, "flops": 1e9 * step}


def test_sparse_spans_by_hand() -> None:
    train = [line(10, 0.0), line(20, 0.5), line(30, 0.75), line(40, 0.0), line(45, 1.0)]
    assert sparse_spans(train) == [(10, 30, 0.625), (40, 45, 1.0)]
    assert sparse_spans([]) == []


def layer(value: float, k: int = 3) -> dict[str, float]:
    return {
        "activation_ratio": value,
        "pattern_similarity": value,
        "mass_caught": value,
        "experts_per_token": k,
    }


def measure(step: int, *layers: dict[str, float], regrouped: bool = False) -> dict[str, Any]:
    also = {"regrouped": [regrouped] * len(layers), "experts_per_token": [4] * len(layers)}
    return {"kind": "measure", "step": step, "layers": list(layers), **also}


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [line(s, 0.75 if s > 30 else 0.0) for s in range(10, 110, 10)]
    records += [measure(s, layer(0.4), layer(0.1), regrouped=s == 50) for s in (25, 50, 75)]
    records += [{"kind": "eval", "step": 50, "val_loss_dense": 2.0, "val_loss_sparse": None}]
    records += [{"kind": "eval", "step": 100, "val_loss_dense": 1.9, "val_loss_sparse": 1.95}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(json.dumps(r) for r in records) + '\n{"kind": "tra')
    assert len(read_records(metrics)) == len(records)
    draw_curves(Study("a run", metrics=read_records(metrics)), tmp_path / "curves.png")
    pixels = imread(tmp_path / "curves.png")
    assert pixels.shape[:2] == (1485, 660)
    assert pixels.std() > 0.05


def drawn(study: Study, name: str) -> Picture:
    picture = next(picture for picture in pictures_of(study) if picture.name == name)
    return draw_picture(picture.draws)


def test_no_line_joins_measurements_of_different_k_and_regroupings_are_marked() -> None:
    ks = {10: 3, 20: 3, 30: 5, 40: 5}
    records = [measure(s, layer(0.4, k), layer(0.1), regrouped=s in (10, 30)) for s, k in ks.items()]
    study = Study("a run", metrics=[line(5, 0.0), *records])
    picture = drawn(study, "experts")
    chosen, caught = picture.figure.axes
    lines = [list(each.get_xdata()) for each in caught.get_lines()]
    marks, in_two, whole = [10, 30], [[10, 20], [30, 40]], [10, 20, 30, 40]
    assert sorted(lines) == sorted([marks, *in_two, whole])
    assert (caught, 30, 0.4, "layer 0, K = 5, step 30: 0.4") in picture.points
    assert (chosen, 40, 4, "layer 1, step 40: 4") in picture.points
    for name in ("loss", "activation_ratio", "experts", "pattern_change"):
        for axes in drawn(study, name).figure.axes:
            assert [10, 30] in [list(each.get_xdata()) for each in axes.get_lines()], name
            assert axes.get_xlim() == chosen.get_xlim(), name  # one axis of steps for all


def test_panels_of_one_measure_have_one_axis() -> None:
    each = [layer(0.5) | {"dead": 0.4, "always_on": 0.0}]
    study = Study("a run", metrics=[measure(s, *each) for s in (10, 20)])
    dead, always_on = drawn(study, "neurons").figure.axes
    assert dead.get_ylim() == always_on.get_ylim()


def test_the_headline_has_both_losses_flops_and_time() -> None:
    summary = {"val_loss_dense": 3.58311, "val_loss_sparse": 3.592, "loss_unit": "nats per token"}
    done = Study("a run", summary=summary | {"flops_ratio": 0.543, "wall_ratio": 0.7})
    assert headline(done) == (
        "Validation loss 3.5831 in dense mode and 3.5920 in sparse mode (nats per token), for 0.54 of the FLOPs and "
        "0.70 of the time of as many plain dense steps."
    )
    going_on = Study(
        "a run", metrics=[{"kind": "eval", "step": 50, "val_loss_dense": 2.0, "val_loss_sparse": None}]
    )
    assert headline(going_on) == "So far: validation loss 2.0000 in dense mode at step 50."
    assert headline(Study("nothing yet")) == ""


def test_what_experts_catch_is_told_with_each_layers_own_k() -> None:
    layers = [
        layer(0.4) | {"mass_by_k": [0.2, 0.5, 0.9, 1.0]},
        layer(0.4) | {"mass_by_k": [0.4, 0.6, 0.8, 1.0]},
    ]
    record = measure(10, *layers, layers[0]) | {
        "experts_per_token": [3, 1, 2],
        "takes_part": [True, True, False],
    }
    told = findings(Study("a run", metrics=[record]))
    assert told[-1] == (
        "2 of 3 layers take part in sparse mode: there the router's 1 to 3 of 4 experts (50% of the neurons) catch "
        "65% of the activation mass at step 10."
    )
    told = findings(Study("a run", metrics=[record | {"takes_part": [False] * 3}]))
    assert told[-1] == "No layer takes part in sparse mode."


def test_a_run_without_measurements_is_drawn_too(tmp_path: Path) -> None:
    draw_curves(Study("a run", metrics=[line(1, 0.0)]), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
