"""Special tokens stand where a model was trained with them, and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from switchable import InputError
from switchable.data.config import ObjectiveConfig
from switchable.data.glue import Example
from switchable.data.objectives import build_objective
from switchable.data.tokenizers import added_tokens, train_bpe
from switchable.evaluation.harness import _tokenizing
from switchable.evaluation.text import overlapping_windows
from switchable.ffn.builders import build_model
from switchable.finetune.classify import _encode
from switchable.infer.generate import write
from switchable.infer.sampling import Sampling

SIZES = {"d_model": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "max_positions": 32}
GREEDY = Sampling(max_new_tokens=2, temperature=0)


def tokenizer(template: str) -> PreTrainedTokenizerBase:
    """One that adds special tokens by itself, as Llama's does ("<s> $A") or T5's ("$A </s>")."""
    trained: Any = train_bpe(["the cat sat on a mat"] * 4, 298)
    backend = trained.backend_tokenizer
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    ids = {name: made.convert_tokens_to_ids(name) for name in ("<s>", "</s>")}
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B:1", special_tokens=list(ids.items())
    )
    return made


CASES = {"<s> $A": (True, False), "$A </s>": (False, True), "<s> $A </s>": (True, True), "$A": (False, False)}


@pytest.mark.parametrize("template", CASES)
def test_what_a_causal_model_is_given(template: str) -> None:
    made = tokenizer(template)
    begins, ends = CASES[template]
    bos, eos = made.bos_token_id, made.eos_token_id
    leading = [bos] if begins else []
    assert added_tokens(made) == (leading, [eos] if ends else [])
    given: list[list[int]] = []

    class Echo(nn.Module):
        config = type("Config", (), {"max_position_embeddings": 32, "is_encoder_decoder": False})

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def generate(self, input_ids: Tensor, **_: Any) -> Tensor:
            given.append(input_ids[0].tolist())
            return input_ids

    model = Echo()
    write(model, made, "the cat", sampling=GREEDY)
    write(model, made, "", sampling=GREEDY)
    text = made("the cat", add_special_tokens=False)["input_ids"]
    assert given == [[*leading, *text], leading or [eos]]
    # Training and calibration begin as a prompt does.
    objective = build_objective("causal", ObjectiveConfig(), made, 6)
    window = np.arange(20, 20 + objective.window)[None]
    assert objective.window == 6 - len(leading)
    made_of = objective(window, np.arange(1), 0)
    assert made_of["input_ids"].tolist() == [[*leading, *window[0]]]
    assert made_of["labels"].tolist() == [[*([-100] if begins else []), *window[0]]]
    with pytest.raises(InputError, match="sequence_length=1 leaves nothing to predict"):
        build_objective("causal", ObjectiveConfig(), made, 1)


@pytest.mark.filterwarnings("default")  # lm-eval's own warnings are not ours to mend
@pytest.mark.parametrize("template", CASES)
def test_what_lm_eval_gives_a_causal_model(template: str) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    made = tokenizer(template)
    begins, _ = CASES[template]
    tokens = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
    model = build_model("llama", SIZES, "relu", len(made), {**tokens, "pad_token_id": made.eos_token_id})
    live = HFLM(pretrained=model, batch_size=1, **_tokenizing(model, made))
    text = [*([made.bos_token_id] if begins else []), *made("the cat", add_special_tokens=False)["input_ids"]]
    assert live.tok_encode("the cat") == text
    assert live.tok_batch_encode(["the cat"])[0].tolist() == [text]
    assert live.prefix_token_id == (made.bos_token_id if begins else made.eos_token_id)
    assert made("the cat")["input_ids"][-1] == (made.eos_token_id if CASES[template][1] else text[-1])


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "roberta", "t5"])
def test_token_types_reach_only_models_that_have_them(family: str) -> None:
    """GPT-2 would add the embeddings of tokens 0 and 1; a generation would be refused by transformers."""
    made: Any = tokenizer("$A")
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's
    made.add_special_tokens({"pad_token": "<pad>", "mask_token": "<mask>"})
    made.add_special_tokens({"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"]})
    tokens = {
        "bos_token_id": made.bos_token_id,
        "eos_token_id": made.eos_token_id,
        "pad_token_id": made.pad_token_id,
    }
    model: Any = build_model(family, SIZES, "relu", len(made) + 2, tokens).eval()
    assert "token_type_ids" in made("the cat")
    given: set[str] = set()
    body = model.base_model
    body.register_forward_pre_hook(
        lambda _m, _a, named: given.update(name for name, value in named.items() if value is not None),
        with_kwargs=True,
    )
    write(model, made, "the <mask> cat" if family in ("bert", "roberta") else "the cat", sampling=GREEDY)
    assert given
    assert "token_type_ids" not in given
    examples = [Example(("the cat", "a mat"), 0)]
    encoded = _encode(examples, made, model, 16)[0]
    assert ("token_type_ids" in encoded) == (family == "bert")


def test_windows_of_text_begin_with_the_begin_of_text_and_predict_each_token_once() -> None:
    batches = list(overlapping_windows(np.arange(10, 33), 8, 2, leading=(5,)))
    rows = [row for batch in batches for row in batch["input_ids"].tolist()]
    assert rows[0] == [5, 11, 12, 13, 14, 15, 16, 17]
    assert rows[1] == [5, 18, 19, 20, 21, 22, 23, 24]
    predicted = [int(t) for batch in batches for row in batch["labels"] for t in row[1:] if t != -100]
    assert predicted == list(range(11, 33))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("special", ["eos_token_id", "bos_token_id"])
def test_a_token_of_the_text_that_also_pads_is_learned(family: str, special: str) -> None:
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model: Any = build_model(family, SIZES, "relu", 300, {**tokens, "pad_token_id": tokens[special]})
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, None)
    row = model.get_input_embeddings().weight[tokens[special]]
    assert row.abs().sum() > 0
    ids = torch.tensor([[1, 5, 2, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad[tokens[special]].abs().sum() > 0


@pytest.mark.parametrize("family", ["bert", "roberta", "t5"])
def test_models_that_pad_need_a_token_for_it(family: str) -> None:
    with pytest.raises(InputError, match=f"pads with its end of text .* family={family}"):
        build_model(family, SIZES, "relu", 300, {"eos_token_id": 2, "pad_token_id": 2})
