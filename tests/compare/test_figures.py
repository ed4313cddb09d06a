"""Every figure of the table by hand, and the table in its three forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from switchable.compare.figures import (
    Validation,
    cost_to_reach,
    curve,
    gain_at_equal_flops,
    loss_at,
    over_seeds,
    own_figures,
    paired_figures,
)
from switchable.compare.picture import STYLES, draw_comparison, loss_limits
from switchable.compare.report import headline, markdown, tabulate


def at(tokens: float, flops: float, seconds: float, loss: float) -> Validation:
    return Validation(tokens, flops, seconds, seconds + 10, loss)


DENSE = [at(10, 100, 10, 4.0), at(20, 200, 20, 3.0), at(30, 300, 30, 2.5)]
FAST = [at(10, 80, 8, 3.9), at(20, 150, 18, 2.8), at(30, 220, 26, 2.4)]
SLOW = [at(10, 150, 15, 4.1), at(20, 320, 33, 2.7), at(30, 500, 50, 2.5)]
NEVER = [at(10, 100, 10, 4.0), at(20, 200, 20, 2.6)]


def summary(points: list[Validation], dense: float | None, sparse: float | None) -> dict[str, Any]:
    last = points[-1]
    return {
        "val_loss_dense": dense,
        "val_loss_sparse": sparse,
        "bits_per_byte_dense": None if dense is None else dense / 2,
        "bits_per_byte_sparse": None if sparse is None else sparse / 2,
        "flops": last.flops,
        "flops_nonembedding": last.flops - 60,
        "sparse_fraction": 0.0 if sparse is None else 0.6,
        "wall_seconds_train": last.seconds,
        "wall_seconds": last.seconds + 7,  # validation and saving: not in the table
        "cpu_seconds_train": 2 * last.seconds,
        "sparse_layers": [0, 1],
        "experts_per_token": [6, 8],
        "experts": {"num_experts": 32},
        "ran_with": [{"threads": 1, "jobs": 2, "device": "cpu"}],
    }


def test_a_curve_is_the_better_mode_at_each_validation() -> None:
    cost = {"tokens": 5, "flops": 7.0, "train_seconds": 3.0, "cpu_seconds": 13.0}
    records = [
        {"kind": "train", "step": 1},
        {"kind": "eval", "val_loss_dense": 3.0, "val_loss_sparse": None, **cost},
        {"kind": "eval", "val_loss_dense": 2.9, "val_loss_sparse": 2.8, **cost},
        {"kind": "eval", "val_loss_dense": None, "val_loss_sparse": 2.7, **cost},
    ]
    assert [point.loss for point in curve(records)] == [3.0, 2.8, 2.7]
    assert curve(records)[0] == at(5, 7.0, 3.0, 3.0)


def test_when_a_loss_is_reached_by_hand() -> None:
    # 2.5 lies three quarters of the way from 2.8 (18 s, 150 FLOPs) down to 2.4 (26 s, 220 FLOPs).
    assert cost_to_reach(FAST, 2.5, "seconds") == pytest.approx(18 + 0.75 * 8)
    assert cost_to_reach(FAST, 2.5, "flops") == pytest.approx(150 + 0.75 * 70)
    assert cost_to_reach(DENSE, 2.5, "seconds") == 30
    assert cost_to_reach(DENSE, 4.5, "seconds") == 10  # at the first validation, or before: nobody looked
    assert cost_to_reach(NEVER, 2.5, "seconds") is None
    bumpy = [at(1, 1, 1, 3.0), at(2, 2, 2, 2.0), at(3, 3, 3, 2.9)]
    assert cost_to_reach(bumpy, 2.5, "seconds") == 1.5  # the first time counts


def test_the_loss_at_a_cost_by_hand() -> None:
    assert loss_at(SLOW, 30, "seconds") == pytest.approx(4.1 - 15 / 18 * 1.4)
    assert loss_at(SLOW, 300, "flops") == pytest.approx(4.1 - 150 / 170 * 1.4)
    assert loss_at(FAST, 30, "seconds") == 2.4  # it ended earlier
    assert loss_at(FAST, 8, "seconds") == 3.9
    assert loss_at(FAST, 7, "seconds") is None
    assert loss_at([], 7, "seconds") is None


def test_paired_figures_by_hand() -> None:
    dense, fast = own_figures(summary(DENSE, 2.5, None)), own_figures(summary(FAST, 2.51, 2.4))
    assert fast["wall_seconds"] == 26
    assert fast["cpu_seconds"] == 52
    assert fast["expert_fraction"] == (1 + 8 / 32) / 2  # the first layer does not take part
    paired = paired_figures(fast, FAST, dense, DENSE)
    expected = {
        "delta_dense": 0.01,
        "delta_sparse": -0.1,
        "flops_ratio": 220 / 300,
        "flops_ratio_nonembedding": 160 / 240,
        "wall_ratio": 26 / 30,
        "cpu_ratio": 52 / 60,
        "time_to_dense_loss_ratio": 24 / 30,
        "cpu_to_dense_loss_ratio": 34 / 40,
        "loss_at_dense_time": 2.4,
        "flops_to_dense_loss_ratio": 202.5 / 300,
        "loss_at_dense_flops": 2.4,
    }
    assert paired == {name: pytest.approx(value) for name, value in expected.items()}
    moe = paired_figures(own_figures(summary(NEVER, None, 2.6)), NEVER, dense, DENSE)
    assert moe["delta_dense"] is None
    assert moe["time_to_dense_loss_ratio"] is None
    # Both have spent 220 FLOPs: dense is a fifth of the way from 3.0 to 2.5 there.
    assert gain_at_equal_flops(FAST, DENSE) == pytest.approx(2.9 - 2.4)
    assert gain_at_equal_flops(DENSE, FAST) == pytest.approx(2.4 - 2.9)


def test_mean_and_spread_over_seeds() -> None:
    found = over_seeds({0: 1.0, 1: 2.0, 2: 6.0})
    assert (found["mean"], found["spread"]) == (3.0, pytest.approx(7**0.5))
    assert found["per_seed"] == {"0": 1.0, "1": 2.0, "2": 6.0}
    assert over_seeds({4: 1.5}) == {"mean": 1.5, "spread": None, "per_seed": {"4": 1.5}}
    assert over_seeds({0: 1.0, 1: None})["mean"] is None
    assert over_seeds({})["mean"] is None


def shifted(points: list[Validation], by: float) -> list[Validation]:
    return [at(p.tokens, p.flops, p.seconds, p.loss + by) for p in points]


@pytest.fixture
def table() -> dict[str, Any]:
    """Seed 1 is worse than seed 0 by 0.3 for both methods; ssd's dense mode is 0.01 or 0.03 above dense's."""
    curves = {
        ("dense", 0): DENSE, ("dense", 1): shifted(DENSE, 0.3),
        ("ssd", 0): FAST, ("ssd", 1): shifted(FAST, 0.3), ("moe", 1): NEVER,
    }  # fmt: skip
    summaries = {
        ("dense", 0): summary(DENSE, 2.5, None),
        ("dense", 1): summary(DENSE, 2.8, None),
        ("ssd", 0): summary(FAST, 2.51, 2.4),
        ("ssd", 1): summary(FAST, 2.83, 2.7),
        ("moe", 1): summary(NEVER, None, 2.6),
    }
    return tabulate(summaries, curves)


def test_pairs_are_compared_before_they_are_averaged(table: dict[str, Any]) -> None:
    ssd = table["methods"]["ssd"]
    assert list(table["methods"]) == ["dense", "ssd", "moe"]
    assert ssd["seeds"] == [0, 1]
    assert ssd["delta_dense"]["mean"] == pytest.approx(0.02)
    assert ssd["delta_dense"]["spread"] == pytest.approx(0.02 / 2**0.5)  # not that of the seeds themselves
    assert ssd["val_loss_dense"]["spread"] == pytest.approx(0.32 / 2**0.5)
    assert ssd["time_to_dense_loss_ratio"]["mean"] == pytest.approx(0.8)
    assert ssd["ended_before_dense"] == {"loss_at_dense_time": True, "loss_at_dense_flops": True}
    assert table["methods"]["moe"]["gain_of_ssd_at_equal_flops"]["mean"] == pytest.approx(
        # At 200 FLOPs: ssd is 50/70 of the way from 3.1 down to 2.7.
        2.6 - (3.1 - 5 / 7 * 0.4)
    )
    assert table["warnings"] == []


def test_the_table_to_read(table: dict[str, Any]) -> None:
    text = markdown(table)
    assert text.startswith(
        "- ssd against dense, seeds 0, 1: loss +0.0200 nats in dense mode, -0.1000 in sparse mode, 0.667 of"
    )
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert rows[""].count("|") == 5
    assert "| +0.0200 ± 0.0141 |" in rows["dense mode - dense's loss (nats)"]
    assert "| 2.5500 ± 0.2121 \\* |" in rows["loss at dense's time"]
    assert "ended with less than dense's (the final loss is shown): ssd, moe." in text
    assert all(f"`{name}`: " in text for name in table["methods"])


def test_the_last_line(table: dict[str, Any]) -> None:
    figures = json.loads(json.dumps(headline(table, Path("somewhere"))))
    assert list(figures)[:6] == [
        "delta_dense",
        "delta_sparse",
        "flops_ratio",
        "flops_ratio_nonembedding",
        "wall_ratio",
        "time_to_dense_loss_ratio",
    ]
    assert figures["delta_dense"] == pytest.approx(0.02)
    assert figures["methods"]["dense"]["val_loss_dense"] == pytest.approx(2.65)
    assert figures["methods"]["moe"]["time_to_dense_loss_ratio"] == pytest.approx(
        # Its curve falls from 4.0 (10 s) to 2.6 (20 s) and passes 2.8 on the way.
        (10 + 12 / 14 * 10) / 30
    )


def test_what_makes_figures_incomparable_is_said() -> None:
    busy = summary(FAST, 2.51, 2.4) | {"ran_with": [{"threads": 2, "jobs": 1, "device": "cpu"}]}
    runs: dict[tuple[str, int], Any] = {("dense", 0): summary(DENSE, 2.5, None), ("ssd", 0): busy}
    curves = {("dense", 0): DENSE, ("ssd", 0): FAST}
    (said,) = tabulate(runs, curves)["warnings"]
    assert "dense: 1 threads on cpu, 2 at a time; ssd: 2 threads on cpu, 1 at a time" in said
    alone = tabulate({("ssd", 3): busy}, {("ssd", 3): FAST})
    assert "no finished dense run" in alone["warnings"][0]
    assert alone["methods"]["ssd"]["wall_ratio"]["mean"] is None
    assert headline(alone, Path())["delta_dense"] is None
    assert "| — |" in markdown(alone)
    unpaired = tabulate(
        {("dense", 0): summary(DENSE, 2.5, None), ("ssd", 3): busy}, {("dense", 0): DENSE, ("ssd", 3): FAST}
    )
    assert "ssd has seeds without a dense run (3)" in unpaired["warnings"][0]


def test_a_loss_that_not_every_seed_reaches_has_no_mean(table: dict[str, Any]) -> None:
    found = table["methods"]["ssd"]
    found["time_to_dense_loss_ratio"] = over_seeds({0: 0.8, 1: None})
    assert "| — (1 of 2) |" in markdown(table)


def test_the_picture(tmp_path: Path) -> None:
    curves = {("dense", 0): DENSE, ("dense", 1): shifted(DENSE, 0.1), ("ssd", 0): FAST}
    draw_comparison(curves, tmp_path / "compare.png")
    pixels = imread(tmp_path / "compare.png")
    assert pixels.shape[:2] == (552, 1920)
    assert pixels.std() > 0.05
    assert [p.name for p in tmp_path.iterdir()] == ["compare.png"]
    low, high = loss_limits([DENSE, FAST])
    assert low < 2.4
    assert 4.0 < high < 4.2
    # In grey, and for a colour-blind reader, two methods differ by marker and dashes at least.
    assert len({style[1] for style in STYLES.values()}) == len(STYLES)
