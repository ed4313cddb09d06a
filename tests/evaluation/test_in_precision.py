"""Jobs on a finished run multiply in the precision that they name: by default the run's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_run

from switchable import InputError
from switchable.cli import main
from switchable.compute.cpu.limits import has_pairs
from switchable.evaluation.config import EvalConfig
from switchable.infer.loss import loss_in_mode
from switchable.infer.precision import chosen_precision, multiplying_in
from switchable.store.find import trained_precision
from switchable.store.load import load
from switchable.study.config import StudyConfig
from switchable.study.study import study_run
from switchable.train.pretrain import pretrain
from switchable.train.setup import set_up

SEED = 4
"""With which the two precisions come to losses that differ clearly."""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(
    request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Any]]:
    out, config = tmp_path_factory.mktemp("run"), small_run(corpus, precision=request.param, seed=SEED)
    return request.param, out / "run", pretrain(config, out / "run", out / "cache", quiet=True)


def test_the_runs_last_losses_are_found_again_in_its_precision_only(
    run: tuple[str, Path, dict[str, Any]], corpus: Path, tmp_path: Path
) -> None:
    precision, folder, figures = run
    batches = set_up(small_run(corpus), tmp_path, quiet=True).validation
    assert trained_precision(folder) == precision
    for given in ("float32", "bfloat16"):
        model, _ = load(folder)
        with multiplying_in(model, chosen_precision(model, given, precision)):
            found = [loss_in_mode(model, batches, mode) for mode in ("dense", "sparse")]
        reported = [figures["val_loss_dense"], figures["val_loss_sparse"]]
        # In bfloat16 the run's attention is `eager`, which rounds elsewhere.
        half = 4e-6 if has_pairs() else 8e-6
        close = pytest.approx(reported, rel=1e-7 if precision == "float32" else half)
        assert (found == close) == (given == precision)


@pytest.mark.parametrize("asked", [None, "float32", "bfloat16"])
def test_eval_multiplies_in_the_precision_that_it_says(
    run: tuple[str, Path, dict[str, Any]], corpus: Path, asked: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    precision, folder, _ = run
    text, losses = sorted(corpus.iterdir())[0], {}
    for flags in ([] if asked is None else ["--precision", asked], ["--precision", precision]):
        assert main(["eval", str(folder), "--data", str(text), "--threads", "1", *flags]) == 0
        shown = capsys.readouterr()
        found = json.loads(shown.out.splitlines()[-1])
        assert found["precision"] == (flags[1] if flags else precision)
        assert shown.err.splitlines()[0] == f"{folder}: multiplies in {found['precision']} on cpu"
        losses[bool(losses)] = [score["value"] for score in found["scores"]]
    assert (losses[False] == losses[True]) == (asked in (None, precision))


def test_study_and_generate_say_theirs(
    run: tuple[str, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    precision, folder, _ = run
    studies = [study_run(folder, StudyConfig(precision=asked), progress=True) for asked in (None, "float32")]
    assert f"measured in {precision} on" in capsys.readouterr().err
    assert [study.probe["precision"] for study in studies] == [precision, "float32"]
    assert (studies[0].results == studies[1].results) == (precision == "float32")
    for flags, expected in (([], "float32"), (["--precision", "bfloat16"], "bfloat16")):
        assert main(["generate", str(folder), "--prompt", "the", "--max-new-tokens", "3", *flags]) == 0
        assert f"dense mode, in {expected}: 3 tokens" in capsys.readouterr().err


def test_weights_decide_where_there_is_no_run_and_are_left_alone(switchable_gpt2: torch.nn.Module) -> None:
    model = switchable_gpt2.to(torch.bfloat16)
    assert chosen_precision(model) == "bfloat16"
    with multiplying_in(model, "bfloat16"):
        assert not torch.is_autocast_enabled("cpu")
    with multiplying_in(model, "float32"):
        assert next(model.parameters()).dtype == torch.float32
    with pytest.raises(InputError, match=r"precision='half' is not known; use one of float32, bfloat16"):
        EvalConfig(precision="half")
