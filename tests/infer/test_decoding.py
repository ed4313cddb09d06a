"""Our own decoding writes what transformers' `generate` writes: per family, mode, width and batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import Holder
from torch import Tensor, nn
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from switchable import InputError, SwitchConfig, convert, set_mode
from switchable.compute.cpu.llvm import this_machine
from switchable.ffn.builders import build_model
from switchable.ffn.convert import layers_of
from switchable.infer.decoding.decoder import Decoder, why_not
from switchable.infer.decoding.matrices import Matrix
from switchable.infer.decoding.rounded import round_to_8_bits

pytestmark = pytest.mark.skipif(
    this_machine() is None, reason="a processor without multiply-add instructions"
)
SIZES = {"d_model": 64, "d_ff": 256, "num_layers": 2, "num_heads": 4, "max_positions": 64}
VOCABULARY, EXPERTS, K, NEW = 131, 8, 2, 12
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_act": "relu",
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
MODELS: dict[str, Any] = {
    **{
        name: lambda name=name: build_model(name, SIZES, "relu2", VOCABULARY, {"eos_token_id": 0})
        for name in ("gpt2", "opt", "llama")
    },
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON)),
    "neox, one after the other": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**COMMON, use_parallel_residual=False)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=None)),
    "mistral, heads of 32": lambda: MistralForCausalLM(
        MistralConfig(**GROUPED, head_dim=32, sliding_window=None)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=32)),
    "arcee": lambda: ArceeForCausalLM(ArceeConfig(**GROUPED | {"hidden_act": "relu2"})),
}


def model_of(name: str, switchable: bool = True) -> Any:
    """A model with random weights, biases and norms included."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for path, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif "embed" not in path and "wte" not in path:
            parameter.data *= 6  # else a token is followed by itself
    if switchable:
        convert(model, SwitchConfig(num_experts=EXPERTS, experts_per_token=K))
    return model


def decided(model: Any) -> Any:
    """The model with the same experts for all tokens: a rounding must not choose others."""
    for layer in layers_of(model):
        layer.router.weight.data.zero_()
        layer.router.bias.data.normal_()
    return model


def padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, what is no padding, and how much there is of it."""
    longest = max(map(len, prompts))
    pads_B = torch.tensor([longest - len(ids) for ids in prompts])
    ids_BS = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    return ids_BS, (torch.arange(longest) >= pads_B.unsqueeze(1)).long(), pads_B


PROMPTS = [[5, 7, 9, 11, 13, 15, 17], [3, 2], [8, 1, 1, 4]]


def theirs(model: Any, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """New tokens [B, N] and their logits [B, N, V], by `generate`."""
    ids_BS, mask_BS, _ = padded(prompts)
    found = model.generate(
        input_ids=ids_BS,
        attention_mask=mask_BS,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return found.sequences[:, ids_BS.shape[1] :], torch.stack(found.logits, dim=1).float()


@torch.inference_mode()
def ours(decoder: Decoder, prompts: list[list[int]], given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same by our own decoding; with `given`, the logits after those tokens."""
    ids_BS, _, pads_B = padded(prompts)
    logits = [decoder.begin(ids_BS, pads_B, ids_BS.shape[1] + NEW)]
    tokens: list[Tensor] = []
    for place in range(NEW):
        tokens.append(logits[-1].argmax(-1) if given is None else given[:, place])
        if place < NEW - 1:
            logits.append(decoder.next(tokens[-1]))
    return torch.stack(tokens, dim=1), torch.stack(logits, dim=1)


def relative_error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", MODELS)
def test_float32_writes_the_same_tokens(name: str, mode: str) -> None:
    model = model_of(name)
    set_mode(model, mode)
    assert why_not(model, mode) is None
    for prompts in (PROMPTS[:1], PROMPTS):
        want, logits = theirs(model, prompts)
        found, own = ours(Decoder(copy.deepcopy(model)), prompts)
        assert torch.equal(found, want)
        assert relative_error(own, logits) < 1e-5
    assert len(set(want.flatten().tolist())) > 3
    Decoder(model)
    again, _ = theirs(model, PROMPTS)  # the model is as it was
    assert torch.equal(again, want)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_has_the_same_logits_to_rounding(name: str, mode: str) -> None:
    model = decided(model_of(name)).to(torch.bfloat16)
    set_mode(model, mode)
    exact = copy.deepcopy(model).float()
    want, logits = theirs(model, PROMPTS)
    true = ours(Decoder(exact), PROMPTS, want)[1]
    own = ours(Decoder(model, "bfloat16"), PROMPTS, want)[1]
    # Ours rounds less: nearer to the same weights in float32 than transformers comes.
    assert relative_error(own, true) < 0.02
    assert relative_error(own, true) <= relative_error(logits, true)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_rounded_as_a_whole(name: str) -> None:
    model = decided(model_of(name))
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    want, logits = ours(Decoder(rounded, "bfloat16"), PROMPTS)
    assert torch.equal(ours(Decoder(model, "bfloat16"), PROMPTS, want)[1], logits)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", MODELS)
def test_8_bits_are_the_rounded_model(name: str, mode: str) -> None:
    model = decided(model_of(name))
    set_mode(model, mode)
    rounded = copy.deepcopy(model)
    round_to_8_bits(rounded)
    want, logits = theirs(rounded, PROMPTS)
    decoder = Decoder(model, "int8")
    own = ours(decoder, PROMPTS, want)[1]
    assert relative_error(own, logits) < 0.02  # reading the prompt rounds to bfloat16 where that is fast
    bytes_ = sum(each.rows_ND.nbytes + each.scale_N.nbytes for each in decoder.matrices.taken.values())
    left = sum(each.nbytes for each in model.parameters())
    assert bytes_ + left < 0.4 * sum(each.nbytes for each in rounded.parameters())


def test_many_tokens_are_those_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2")
    for mode in ("dense", "sparse"):
        set_mode(model, mode)
        few = ours(Decoder(copy.deepcopy(model)), PROMPTS)
        with monkeypatch.context() as patch:
            patch.setattr("switchable.infer.decoding.ffn.MOST_SPARSE", 0)
            patch.setattr("switchable.infer.decoding.ffn.MOST_DENSE", 0)
            patch.setattr("switchable.infer.decoding.matrices.MOST_COMPILED", 0)
            many = ours(Decoder(copy.deepcopy(model)), PROMPTS)
        assert torch.equal(few[0], many[0])
        assert relative_error(many[1], few[1]) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_that_is_not_converted_is_decoded_dense(name: str) -> None:
    model = model_of(name, switchable=False)
    want, _ = theirs(model, PROMPTS)
    assert torch.equal(ours(Decoder(model), PROMPTS)[0], want)


def test_other_activations_are_decoded_dense_and_not_sparse() -> None:
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON | {"hidden_act": "gelu"})).eval()
    convert(model, SwitchConfig(num_experts=EXPERTS, experts_per_token=K))
    assert "no compiled code for experts with gelu" in str(why_not(model, "sparse"))
    want, _ = theirs(model, PROMPTS)
    assert why_not(model) is None
    assert torch.equal(ours(Decoder(model), PROMPTS)[0], want)


def test_a_family_or_setting_that_is_not_known_says_why() -> None:
    t5 = build_model("bert", SIZES, "relu", VOCABULARY, {"pad_token_id": 1, "eos_token_id": 0})
    assert "is a BertForMaskedLM, none of GPT2LMHeadModel" in str(why_not(t5))
    windowed = MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=8))
    assert "sliding window of 8 of its 64 positions" in str(why_not(windowed))
    after = MODELS["opt"]()
    after.config.do_layer_norm_before = False
    assert "its norms come after" in str(why_not(after))
    dynamic = MODELS["llama"]()
    dynamic.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "rotary positions of type dynamic" in str(why_not(dynamic))
    quantised = MODELS["llama"]()
    head = quantised.lm_head
    head.weight = torch.nn.Parameter(Holder(head.weight.detach()))
    assert "weights that are no plain tensors" in str(why_not(quantised))


def test_what_cannot_be_decoded_is_refused() -> None:
    model = model_of("gpt2")
    with pytest.raises(InputError, match="weights='int4' is not known; use one of float32, bfloat16, int8"):
        Decoder(model, "int4")
    decoder = Decoder(model)
    with pytest.raises(
        InputError, match=r"the prompt has 3 tokens, 65 with what is to be written.*64 positions"
    ):
        decoder.begin(torch.ones(1, 3, dtype=torch.int64), places=65)


def test_8_bits_of_a_width_that_vectors_do_not_fill_are_refused_and_nothing_is_changed() -> None:
    sizes = SIZES | {"d_model": 20, "d_ff": 80}
    model = build_model("gpt2", sizes, "relu", VOCABULARY, {"eos_token_id": 0}).eval()
    with pytest.raises(InputError, match=r"weights=int8 needs a d_model that is a multiple of .*, not 20"):
        Decoder(model, "int8")
    want, _ = theirs(model, PROMPTS)
    assert torch.equal(ours(Decoder(model), PROMPTS)[0], want)  # torch multiplies wider ones


def test_our_loops_multiply_few_tokens_and_torch_many(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder: Any = Decoder(model_of("gpt2"))
    seen: list[int] = []
    monkeypatch.setattr(
        "switchable.infer.decoding.matrices.linear",
        lambda x, w, b: seen.append(len(x)) or nn.functional.linear(x, w, b),
    )
    head: Matrix = decoder.head
    for tokens in (1, 32, 33):
        head(torch.randn(tokens, 64))
    assert seen == [33]
