"""TensorBoard: the layers of a measure stand in one chart."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2


def test_the_layers_of_a_measure_stand_in_one_chart(
    trained: Callable[[str], tuple[Path, dict[str, Any]]],
) -> None:
    board = EventAccumulator(str(trained("gpt2")[0] / "tensorboard"))
    board.Reload()
    told = layout_pb2.Layout.FromString(
        board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    charts = {chart.title: chart.multiline.tag for category in told.category for chart in category.chart}
    tags = board.Tags()["scalars"]
    shown = {
        title: [t for t in tags for regex in regexes if re.match(regex, t)]
        for title, regexes in charts.items()
    }
    assert shown["loss"] == ["train/loss", "eval/val_loss_dense", "eval/val_loss_sparse"]
    for name in (
        "activation_ratio",
        "experts_per_token",
        "mass_caught",
        "pattern_similarity",
        "sparse_steps",
    ):
        assert shown[name] == [f"{name}/layer 0", f"{name}/layer 1"]
    by_layer = [tag for tag in tags if "/layer " in tag]
    assert sorted(by_layer) == sorted(
        tag for title, found in shown.items() if title != "loss" for tag in found
    )
