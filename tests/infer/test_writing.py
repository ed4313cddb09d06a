"""Text grows by whole characters, is shown at once, and ends before a stop string, by either way of writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from switchable import SwitchConfig, convert
from switchable.cli import main
from switchable.compute.cpu.llvm import this_machine
from switchable.data.tokenizers import train_bpe
from switchable.ffn.builders import build_model
from switchable.infer.decoding.decoder import Decoder
from switchable.infer.decoding.loop import why_not_written
from switchable.infer.generate import decoding, write, write_each
from switchable.infer.sampling import Sampling
from switchable.infer.text import GrowingText
from switchable.store.checkpoint import save

TEXT = "the cat sat on a mat, señor ☕ the end"
GREEDY = Sampling(max_new_tokens=12, temperature=0)
compiled = pytest.mark.skipif(this_machine() is None, reason="a processor without multiply-add instructions")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_bpe([TEXT] * 3, 300)


def model_of(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "max_positions": 40}
    model = build_model("gpt2", sizes, "relu", len(tokenizer), {"eos_token_id": tokenizer.eos_token_id})
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "wte" not in name:
            parameter.data *= 8
    convert(model, SwitchConfig(num_experts=8, experts_per_token=2))
    return model.eval()


def grown(tokenizer: Any, text: str, first: int, **how: Any) -> tuple[str, list[str], int]:
    """The text, the pieces shown, and the tokens put, of a text put token by token behind its first ones."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown: list[str] = []
    growing = GrowingText(tokenizer, ids[:first], show=shown.append, **how)
    for token in ids[first:]:
        if growing.put(token):
            break
    return growing.close(), shown, growing.new_tokens


def test_pieces_are_whole_characters_and_make_the_text(tokenizer: Any) -> None:
    text, shown, tokens = grown(tokenizer, TEXT, 2)
    assert text == "".join(shown) == TEXT
    assert all("\ufffd" not in piece for piece in shown)
    assert tokens == len(tokenizer(TEXT)["input_ids"]) - 2
    assert len(shown) > 5


@pytest.mark.parametrize(
    ("stop", "want"),
    [
        (["mat"], "the cat sat on a "),
        ([" on a matter", "señ"], "the cat sat on a mat, "),
        (["the"], "the cat sat on a mat, señor ☕ "),
        (["dog"], TEXT),
    ],
)
def test_a_text_ends_before_a_stop_string_that_is_not_in_the_prompt(
    tokenizer: Any, stop: list[str], want: str
) -> None:
    text, shown, _ = grown(tokenizer, TEXT, 2, stop=stop)
    assert text == "".join(shown) == want


def test_a_text_ends_with_a_token_that_ends_texts(tokenizer: Any) -> None:
    ids = tokenizer("the cat")["input_ids"]
    growing = GrowingText(tokenizer, ids, ends=[tokenizer.eos_token_id])
    assert [growing.put(token) for token in (ids[0], tokenizer.eos_token_id, ids[0])] == [False, True, True]
    assert growing.new_tokens == 2
    assert growing.close() == "the cat" + tokenizer.decode(ids[0])


@compiled
@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(12, temperature=1.5, top_k=20, seed=3)], ids=["greedy", "drawn"]
)
def test_both_ways_write_the_same(tokenizer: Any, mode: str, sampling: Sampling) -> None:
    model = model_of(tokenizer)
    prompts = ["the cat", "a", "the mat, the"]
    theirs = write_each(model, tokenizer, prompts, mode, sampling=sampling)
    stop = theirs[0].text[len("the cat") + 8 : len("the cat") + 10]
    cut = write_each(model, tokenizer, prompts, mode, sampling=sampling, stop=[stop])
    assert theirs[0].text.startswith(cut[0].text)
    assert len(cut[0].text) < len(theirs[0].text)
    decoder, why_not = decoding(model, "float32", mode, sampling)
    assert isinstance(decoder, Decoder)
    assert why_not is None
    ours = write_each(decoder, tokenizer, prompts, mode, sampling=sampling)
    assert [each[:2] for each in ours] == [each[:2] for each in theirs]
    ours = write_each(decoder, tokenizer, prompts, mode, sampling=sampling, stop=[stop])
    assert [each.text for each in ours] == [each.text for each in cut]


@compiled
def test_what_is_shown_is_what_is_written(tokenizer: Any) -> None:
    model = model_of(tokenizer)
    for way in (model, Decoder(model)):
        shown: list[str] = []
        found = write(way, tokenizer, "the cat", sampling=GREEDY, show=shown.append)
        assert "".join(shown) == found.text
        assert len(shown) > 3
        assert found.tokens == 12


@compiled
def test_settings_of_generation_that_our_loop_does_not_know_are_left_to_transformers(tokenizer: Any) -> None:
    model = model_of(tokenizer)
    model.generation_config.top_p = 0.9
    assert why_not_written(model, GREEDY) is None
    assert "asks for top_p in its generation config" in str(why_not_written(model, Sampling()))
    model.generation_config.repetition_penalty = 1.2
    for width in ("bfloat16", "int8"):
        ready, why_not = decoding(model, width, "dense", GREEDY)
        assert ready is model
        assert "asks for repetition_penalty" in str(why_not)


@pytest.mark.parametrize(("family", "prompt"), [("gpt2", "the cat"), ("bert", "the <mask> sat")])
def test_weights_in_float16_are_widened(
    family: str, prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = train_bpe([TEXT] * 3, 300, "masked" if family == "bert" else "causal")
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "max_positions": 40}
    special = {"eos_token_id": own.eos_token_id}
    special |= {"pad_token_id": own.pad_token_id} if family == "bert" else {}
    model = build_model(family, sizes, "relu", len(own), special).half()
    convert(model, SwitchConfig(num_experts=8, experts_per_token=2))
    save(tmp_path / "half", model, tokenizer=own)
    assert main(["generate", str(tmp_path / "half"), "--prompt", prompt, "--max-new-tokens", "2"]) == 0
    assert "dense mode, in float32" in capsys.readouterr().err
