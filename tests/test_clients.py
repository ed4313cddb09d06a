"""The harness for models of transformers: its verdicts, its counts, and the table in the docs."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from torch import nn

from experiments import client_trial
from experiments.client_build import build, classes
from experiments.client_build import inputs as batch_for
from experiments.client_models import counts, in_its_own_process, line
from experiments.client_table import DOCS, RESULTS, table, with_table
from experiments.client_trial import Verdict, attempt
from switchable.ffn.convert import layers_of

KNOWN = classes()


@pytest.mark.parametrize(
    ("name", "form", "ffns"),
    [
        ("GPTNeoXForCausalLM", "plain", 2),
        ("DistilBertForMaskedLM", "plain", 2),
        ("Phi3ForCausalLM", "gated", 2),
        ("ZambaForCausalLM", "gated", 2),  # its layers share their FFN's weights
        ("WhisperForConditionalGeneration", "plain, in the layer", 4),
        ("CohereAsrForConditionalGeneration", "plain, in the layer", 6),  # with BatchNorm
        ("SeamlessM4TForSpeechToText", "plain", 8),  # two ReLUs are a convolution's
    ],
)
def test_a_class_that_works(name: str, form: str, ffns: int) -> None:
    verdict = attempt(name, KNOWN[name])
    assert (verdict.verdict, verdict.why, verdict.form.split(",")[0]) == ("works", "", form.split(",")[0])
    assert verdict.ffns == ffns
    assert 0 < verdict.figures["all experts"] < 1e-5  # 0 would be the same arithmetic: nothing shown


@pytest.mark.parametrize(
    ("name", "verdict", "why"),
    [
        ("MixtralForCausalLM", "mixture", "mixture of experts"),
        ("BitNetForCausalLM", "refused", ""),
        ("BloomForCausalLM", "no ReLU", "its activation is tanh"),
        ("DbrxForCausalLM", "cannot build", "AttributeError"),
    ],
)
def test_a_class_that_does_not(name: str, verdict: str, why: str) -> None:
    found = attempt(name, KNOWN[name])
    assert found.verdict == verdict
    assert why in found.why
    assert not found.ffns


@pytest.mark.parametrize("what", ["a weight", "a dropout", "an FFN left out"])
def test_a_model_that_is_another_after_conversion_is_found_out(what: str) -> None:
    kind = KNOWN["GPT2LMHeadModel"]
    model, plain, batch = build(kind), build(kind), batch_for(build(kind))
    reference = client_trial.see(plain, batch)
    client_trial.converted(model, batch)
    calls = 2
    if what == "a weight":
        with torch.no_grad():
            layers_of(model)[1].ssd.up_projection.weight[3].neg_()
    elif what == "a dropout":
        model.transformer.h[0].mlp.dropout.p = 0.0
    else:
        calls = 3
    says = {"a weight": "dense:", "a dropout": "training, dropout on:", "an FFN left out": "2 of 3 FFNs"}[
        what
    ]
    with pytest.raises(client_trial.WrongError, match=says):
        client_trial.tried(model, plain, batch, reference, calls)


def test_a_class_that_kills_its_process_is_wrong_and_nothing_else() -> None:
    class Deadly(nn.Module):
        def __init__(self, *_: Any) -> None:
            os._exit(3)

    Deadly.config_class = KNOWN["GPT2LMHeadModel"].config_class  # type: ignore[attr-defined]
    verdict = in_its_own_process("Deadly", Deadly)
    assert (verdict.verdict, verdict.why) == ("WRONG", "ended with exit code 3")


def test_counts_by_hand() -> None:
    names = ["works"] * 6 + ["refused", "WRONG"] + ["mixture"] * 3 + ["no ReLU", "cannot build"]
    found = [Verdict(f"M{number}", name) for number, name in enumerate(names)]
    assert counts(found) == {
        "models": 13, "WRONG": 1, "cannot build": 1, "mixture": 3, "no ReLU": 1, "refused": 1, "works": 6,
        "share_working": 0.75,
    }  # fmt: skip
    assert line(Verdict("A", "works", "", 2, "gated", {"dense": 0.0, "all": 3e-7})).split() == (
        ["works", "A", "2", "FFNs,", "gated;", "at", "most", "3.0e-07", "apart"]
    )


def test_the_table_is_what_the_results_say() -> None:
    text, results = DOCS.read_text(encoding="utf-8"), json.loads(RESULTS.read_text(encoding="utf-8"))
    assert with_table(text, results) == text
    works = [model["model"] for model in results["models"] if model["verdict"] == "works"]
    assert len(works) > 40
    assert results["counts"]["share_working"] >= 0.9
    for model in results["models"]:
        assert table(results).count(f" {model['model']}") >= 1


def test_what_the_report_says_was_left_alone_is_not_left_out_in_silence() -> None:
    verdict = attempt("PerceiverForMaskedLM", KNOWN["PerceiverForMaskedLM"])
    assert (verdict.verdict, verdict.ffns) == ("works", 3)
    assert verdict.why.startswith(
        "left alone: perceiver.decoder.decoding_cross_attention.mlp.dense2, it is in no layer"
    )
