"""`auto`: which backend it is for a call, by a rule that measures nothing and compiles nothing."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from compute.problems import Case, outcome, problem

from switchable.compute.call import FFNWeights
from switchable.compute.choose import BACKENDS, choose
from switchable.compute.cpu import topk
from switchable.compute.cpu.active import library as active_library
from switchable.compute.cpu.active.active import has_active, skips_idle_neurons
from switchable.compute.cpu.decode import compiled
from switchable.compute.cpu.experts import library
from switchable.compute.cpu.llvm import this_machine

pytestmark = pytest.mark.skipif(
    this_machine() is None, reason="a processor without multiply-add instructions"
)
HERE = this_machine()
assert HERE is not None
ODD = Case(width=13)
# An expert's product: tokens · 3/8 rows, 16 wide, 31 neurons; that is 186 multiplications per token.
SMALL = Case(width=16, neurons=31, experts=8)
LARGE = Case(tokens=64, width=64, neurons=512, experts=1, chosen=1)
HALF = torch.bfloat16
AUTO = {
    # Without gradients: compiled code up to 32 tokens, operations of torch for fewer where there is none.
    ("one token", False): (replace(SMALL, tokens=1), "decode"),
    ("32 tokens", False): (replace(SMALL, tokens=32), "decode"),
    ("33 tokens", False): (replace(SMALL, tokens=33), "fused"),
    ("relu2", False): (replace(SMALL, tokens=8, activation="relu2"), "decode"),
    ("one token, odd width", False): (replace(ODD, tokens=1, experts=8), "decode"),
    ("many experts needed, odd width", False): (replace(ODD, tokens=16, experts=8), "fused"),
    ("one token, gated silu", False): (replace(SMALL, tokens=1, gated=True, activation="silu"), "decode"),
    ("17 tokens, gated silu", False): (replace(SMALL, tokens=17, gated=True, activation="silu"), "masked"),
    ("32 tokens, gated", False): (replace(SMALL, tokens=32, gated=True), "decode"),
    ("33 tokens, gated", False): (replace(SMALL, tokens=33, gated=True), "fused"),
    ("one token, bfloat16", False): (replace(SMALL, tokens=1, dtype=HALF), "decode"),
    ("32 tokens, bfloat16", False): (replace(SMALL, tokens=32, dtype=HALF), "decode"),
    ("33 tokens, bfloat16", False): (replace(SMALL, tokens=33, dtype=HALF), "fused"),
    ("32 tokens, bfloat16, gated", False): (replace(SMALL, tokens=32, dtype=HALF, gated=True), "decode"),
    ("two tokens, float16", False): (replace(SMALL, tokens=2, dtype=torch.float16), "decode"),
    ("float64, 16 tokens", False): (replace(SMALL, tokens=16, dtype=torch.float64), "fused"),
    ("stored as nn.Linear", False): (replace(SMALL, tokens=63, stored="linear"), "masked"),
    ("no token", False): (replace(SMALL, tokens=0), "decode"),
    # With gradients.
    ("15 tokens", True): (replace(SMALL, tokens=15), "masked"),
    ("16 tokens", True): (replace(SMALL, tokens=16), "fused"),
    ("63 tokens, stored as nn.Linear", True): (replace(SMALL, tokens=63, stored="linear"), "masked"),
    ("64 tokens, stored as nn.Linear", True): (replace(SMALL, tokens=64, stored="linear"), "fused"),
    ("float64", True): (replace(SMALL, tokens=64, dtype=torch.float64), "fused"),
    ("no token", True): (replace(SMALL, tokens=0), "masked"),
    ("an expert of 512 neurons", True): (LARGE, "fused"),
    ("gated relu, 15 tokens", True): (replace(SMALL, tokens=15, gated=True), "masked"),
    ("gated relu", True): (replace(SMALL, tokens=64, gated=True), "fused"),
    ("gated relu2", True): (replace(SMALL, tokens=64, gated=True, activation="relu2"), "fused"),
    ("gated, an expert of 512 neurons", True): (replace(LARGE, gated=True), "fused"),
    ("gated relu, odd width, large", True): (replace(LARGE, width=61, gated=True), "fused"),
    ("gated relu, odd width", True): (replace(ODD, tokens=64, gated=True), "fused"),
    ("gelu", True): (replace(SMALL, tokens=64, activation="gelu"), "masked"),
    ("gelu, large", True): (replace(LARGE, activation="gelu"), "reference"),
    ("gated silu, large", True): (replace(LARGE, activation="silu", gated=True), "reference"),
    ("bfloat16", True): (replace(SMALL, tokens=64, dtype=HALF), "fused"),
    ("bfloat16, odd width", True): (replace(LARGE, width=61, dtype=HALF), "fused"),
    ("odd width", True): (replace(ODD, tokens=700), "fused"),
}
"""Name of a case, whether it learns; what `auto` is for it."""
UNDER_AUTOCAST = {
    ("few tokens", False): (replace(SMALL, tokens=2), "fused"),
    ("few tokens, gelu", False): (replace(SMALL, tokens=2, activation="gelu"), "masked"),
    ("16 tokens", True): (replace(SMALL, tokens=16), "fused"),
    ("large, no whole pairs", True): (replace(LARGE, width=48), "fused"),
    ("large, gated", True): (replace(LARGE, gated=True), "fused"),
    ("large, gated silu", True): (replace(LARGE, gated=True, activation="silu"), "reference"),
}


@pytest.mark.parametrize(("key", "wanted"), AUTO.items(), ids=str)
def test_auto_is_a_backend_by_name(key: tuple[str, bool], wanted: tuple[Case, str]) -> None:
    (_, learns), (case, name) = key, wanted
    with torch.set_grad_enabled(learns):
        assert choose(problem(case).call).name == name
        if learns and case.tokens < 3000:
            auto, named = outcome(problem(case), "auto"), outcome(problem(case), name)
            assert all(torch.equal(auto[tensor], named[tensor]) for tensor in auto)
        elif not learns:
            assert torch.equal(problem(case).run("auto"), problem(case).run(name))


@pytest.mark.parametrize(("key", "wanted"), UNDER_AUTOCAST.items(), ids=str)
def test_under_autocast(key: tuple[str, bool], wanted: tuple[Case, str]) -> None:
    (_, learns), (case, name) = key, wanted
    with torch.set_grad_enabled(learns), torch.autocast("cpu", dtype=HALF):
        assert choose(problem(case).call).name == name
        assert torch.equal(problem(case).run("auto"), problem(case).run(name))


def test_answers_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (topk, active_library, compiled, library):
        monkeypatch.setattr(module, "Code", lambda *_: pytest.fail("compiled"))
    for cache in (topk._code, active_library.active_library, compiled._code, library.library):
        cache.cache_clear()
    cases = [case for table in (AUTO, UNDER_AUTOCAST) for case, _ in table.values()]
    for case in cases:
        for grad, context in ((True, nullcontext()), (False, nullcontext()), (False, torch.autocast("cpu"))):
            with torch.set_grad_enabled(grad), context:
                call = problem(case).call
                choose(call)
                for backend in BACKENDS.values():
                    backend.supports(call)
    weights = FFNWeights(torch.zeros(8, 64), torch.zeros(8, 64))
    assert has_active(torch.zeros(4, 64), weights, "relu")
    assert skips_idle_neurons(64, "relu", torch.float32, "cpu")
    assert not skips_idle_neurons(61, "relu", torch.float32, "cpu")
    assert not skips_idle_neurons(64, "gelu", torch.float32, "cpu")
    assert not skips_idle_neurons(64, "relu", torch.float32, "cuda")
