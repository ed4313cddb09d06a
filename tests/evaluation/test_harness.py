"""lm-eval on the live model with local data: its figures against ours by hand; wrong tasks and data."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from switchable import InputError, set_mode
from switchable.cli import main
from switchable.data.config import DataConfig
from switchable.data.glue import Example, examples
from switchable.evaluation.config import EvalConfig
from switchable.evaluation.run import evaluate
from switchable.evaluation.tasks import task_config
from switchable.files import read_records
from switchable.store.load import load

Runs = Callable[[str], tuple[Path, dict[str, Any]]]

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")  # lm-eval's own warnings are not ours to mend


@pytest.fixture
def lambada(tmp_path: Path) -> Path:
    texts = ["the cat sat on a mat and saw one red dog", "over the hill to find some fish", "the dog run on"]
    path = tmp_path / "lambada_test.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    for name, lines in {
        "SST-2": ["sentence\tlabel", "the cat sat \t1", "a red dog \t0", 'fish "to" find\t1'],
        "CoLA": ["x1\t1\t\tThe cat sat.", "x1\t0\t*\tSat cat the."],
        "RTE": ["index\tsentence1\tsentence2\tlabel", "0\tthe cat sat\ta cat sat\tentailment",
                "1\tthe dog\ta fish\tnot_entailment"],
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "dev.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_lambada_by_hand(trained: Runs, lambada: Path) -> None:
    folder, _ = trained("gpt2")
    config = EvalConfig(tasks=(f"lambada={lambada}",), experts_per_token=(2,), threads=1)
    scores = {(str(s.way), s.metric): s for s in evaluate(folder, config, DataConfig()).scores}
    model, tokenizer = load(folder)
    assert tokenizer is not None
    for way, mode in (("dense", "dense"), ("sparse K=2", "sparse")):
        set_mode(model, mode, 2)
        logs, right = [], []
        for line in lambada.read_text().splitlines():
            context, _, word = json.loads(line)["text"].rpartition(" ")
            before, after = tokenizer(context)["input_ids"], tokenizer(" " + word)["input_ids"]
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
            rows = log_p[len(before) - 1 : -1]
            logs.append(sum(float(row[t]) for row, t in zip(rows, after, strict=True)))
            right.append(rows.argmax(-1).tolist() == after)
        assert scores[way, "perplexity"].value == pytest.approx(math.exp(-sum(logs) / 3), rel=1e-4)
        assert scores[way, "acc"].value == pytest.approx(sum(right) / 3)
        assert scores[way, "acc"].stderr is not None
        assert scores[way, "acc"].examples == 3


def test_the_command(
    trained: Runs, glue: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained("t5")  # an encoder-decoder model has probabilities of texts too
    out = tmp_path / "scores.json"
    code = main(
        ["eval", str(folder), "--tasks", f"sst2={glue}", f"cola={glue}", f"rte={glue}", "--data", str(corpus),
         "--mode", "sparse", "--threads", "1", "--out", str(out), "--quiet"]
    )  # fmt: skip
    shown = capsys.readouterr()
    printed = shown.out.splitlines()
    assert code == 0
    assert "requests" not in shown.err  # lm-eval's bars
    assert printed[0].split() == ["task", "metric", "examples", "sparse", "K=3"]
    result = json.loads(printed[-1])
    assert result == json.loads(out.read_text())
    found = {(s["task"], s["metric"]): s["examples"] for s in result["scores"]}
    assert found.pop(("text", "loss (nats per token of the spans)")) > 1
    assert found == {("sst2", "acc"): 3, ("cola", "mcc"): 2, ("cola", "acc"): 2, ("rte", "acc"): 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "hellaswg"], ["'hellaswg' is not known", "hellaswag", "sst2=PATH"]),
        (["--tasks", "sst3={data}"], ["'sst3' has no task file here", "did you mean 'sst2'?"]),
        (["--tasks", "sst2={data}/nothing"], ["no dev.tsv of sst2", "nothing/SST-2/dev.tsv"]),
        (["--tasks", "lambada={data}/nothing"], ["no LAMBADA data"]),
        (["--tasks", "sst2={data}", "cola={data}", "sst2"], ["'sst2' is given 2 times; give each once"]),
        (["--data", "{data}/nothing.txt"], ["nothing.txt"]),
        (["--data", "{data}", "--experts-per-token", "9"], ["experts_per_token=9", "from 1 to 8"]),
        (
            ["--data", "{data}", "--mode", "dense", "--mass", "0.9"],
            ["--mass would change nothing in dense mode"],
        ),
        (["--data", "{data}", "--batch-size", "0"], ["batch_size=0"]),
    ],
)
def test_wrong_requests(
    trained: Runs, glue: Path, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained("gpt2")
    assert main(["eval", str(folder), *(a.replace("{data}", str(glue)) for a in arguments)]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said


def test_wrong_models(trained: Runs, glue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained("bert")[0]), "--tasks", f"sst2={glue}"]) == 2
    assert "a masked language model gives no probability of a text" in capsys.readouterr().err
    assert main(["eval", str(glue / "nowhere"), "--tasks", f"sst2={glue}"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_without_lm_eval(trained: Runs, lambada: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(InputError, match=r"pip install 'switchable\[eval\]'"):
        evaluate(trained("gpt2")[0], EvalConfig(tasks=(f"lambada={lambada}",)), DataConfig())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ValueError("Duplicate task 'rte':\nfound in both"),
            r"^lm-eval cannot run .* \(Duplicate task 'rte': found",
        ),
        (InputError("line 3: no label"), r"^line 3: no label$"),
    ],
)
def test_what_lm_eval_refuses_is_told_in_a_line(
    trained: Runs, lambada: Path, error: ValueError, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.simple_evaluate", Mock(side_effect=error))
    with pytest.raises(InputError, match=words):
        evaluate(trained("gpt2")[0], EvalConfig(tasks=(f"lambada={lambada}",)), DataConfig())


def test_wrong_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nfine\t1\nfine\t2\n")
    with pytest.raises(InputError, match=r"dev.tsv, line 3: label '2' is not one of 0, 1"):
        task_config("sst2", tmp_path)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nno label\n")
    with pytest.raises(InputError, match="line 2: 1 columns"):
        task_config("sst2", tmp_path)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(InputError, match="holds no examples"):
        task_config("sst2", tmp_path)
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "one two"}\n{"txt": "three"}\n')
    with pytest.raises(InputError, match="line 2: no field 'text'; did you mean 'txt'"):
        task_config("lambada", tmp_path)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    odd = "one\u2028two\x85three\x0bfour\x1cfive"  # what str.splitlines takes for ends of lines
    records = [{"text": f"{odd} six"}, {"text": "seven eight\n"}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (tmp_path / "lambada_test.jsonl").write_bytes("\r\n".join([*lines, "", " "]).encode())
    found = task_config("lambada", tmp_path)["custom_dataset"]()["test"].to_list()
    assert found == [{"context": odd, "word": "six"}, {"context": "seven", "word": "eight"}]
    (tmp_path / "dev.tsv").write_bytes(f"\ufeffsentence\tlabel\r\n{odd}\t1\r\n\r\n".encode())
    assert examples("sst2", tmp_path, "dev") == [Example((odd,), 1)]
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"a": odd}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert read_records(tmp_path / "metrics.jsonl") == [{"a": odd}]
