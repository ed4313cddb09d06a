"""AMX: when it is used, what is compiled, and that no result depends on threads or on what memory held.

`test_half.py` compares the experts' results; `test_emulated_amx.py` one tile's product.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from compute.emulated_amx import EMULATED, always_in_tiles
from compute.problems import Case, outcome, problem
from llvmlite import binding

from switchable.compute.cpu import code, instructions, llvm
from switchable.compute.cpu.amx import AMX, CONFIGURATION
from switchable.compute.cpu.experts import fused
from switchable.compute.cpu.experts.library import WRITERS, Library
from switchable.compute.cpu.experts.packing import Packing, suited
from switchable.compute.cpu.llvm import Machine, this_machine

HERE = this_machine()
pytestmark = pytest.mark.skipif(HERE is None or not HERE.pairs, reason="a processor without AVX512-BF16")
HALF = torch.bfloat16
PLAIN = ("_relu", "_bias_relu", "_mask", "_slope")
GATED = ("_relu", "_bias_relu", "", "_bias", "_gated_mask", "_gated_slope")
SAPPHIRE_RAPIDS = ("fma", "avx512f", "avx512bf16", "amx-tile", "amx-bf16")


class Features(dict[str, bool]):
    def flatten(self) -> str:
        return ",".join(name for name, on in self.items() if on)


def machine_with(
    monkeypatch: pytest.MonkeyPatch, *names: str, limit: str = "", refusal: str | None = None
) -> Machine:
    """The machine that is found on a processor with these features."""
    monkeypatch.setattr(llvm.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(llvm.llvm, "get_host_cpu_features", lambda: Features(dict.fromkeys(names, True)))
    monkeypatch.setattr(instructions, "ask_for_tiles", lambda: refusal)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    found: Machine = llvm.this_machine.__wrapped__()
    return found


def test_amx_is_used_where_the_processor_has_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_with(monkeypatch, *SAPPHIRE_RAPIDS).amx == AMX()
    assert machine_with(monkeypatch, *SAPPHIRE_RAPIDS[:-1]).amx is None
    assert machine_with(monkeypatch, *SAPPHIRE_RAPIDS[:3]).amx is None


def test_llvm_may_use_by_itself_no_more_than_our_loops_do(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("avx2", *SAPPHIRE_RAPIDS, "avx512vl", "amx-int8", "avx512fp16")
    for limit, left in (
        ("AVX2", "avx2,fma"),
        ("AVX512_CORE", "avx2,fma,avx512f,avx512vl,avx512fp16"),
        ("AVX512_CORE_BF16", "avx2,fma,avx512f,avx512bf16,avx512vl,avx512fp16"),
        ("", ",".join(names)),
    ):
        assert machine_with(monkeypatch, *names, limit=limit).features == left


@pytest.mark.parametrize(
    ("limit", "amx", "pairs", "vector_bytes"),
    [
        ("", True, True, 64),
        ("ALL", True, True, 64),
        ("AVX512_CORE_AMX", True, True, 64),
        ("AVX10_1_512_AMX_FP16", True, True, 64),
        ("a word that oneDNN does not know", True, True, 64),
        ("AVX512_CORE_FP16", False, True, 64),
        ("AVX512_CORE_BF16", False, True, 64),
        ("avx512_core_bf16", False, True, 64),
        ("AVX512_CORE_VNNI", False, False, 64),
        ("AVX512_CORE", False, False, 64),
        ("AVX2_VNNI", False, False, 32),
        ("AVX2", False, False, 32),
    ],
)
def test_the_limit_of_torch_s_products_is_ours(
    limit: str, amx: bool, pairs: bool, vector_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = machine_with(monkeypatch, *SAPPHIRE_RAPIDS, limit=limit)
    assert (found.amx is not None, found.pairs, found.vector_bytes) == (amx, pairs, vector_bytes)


def test_a_limit_before_multiply_add_leaves_no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_with(monkeypatch, *SAPPHIRE_RAPIDS, limit="AVX") is None


def test_a_system_that_refuses_the_registers_is_named_and_pairs_are_multiplied_instead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = machine_with(monkeypatch, *SAPPHIRE_RAPIDS, refusal="Operation not permitted")
    assert (found.amx, found.pairs) == (None, True)
    assert caplog.messages == [
        "bfloat16 is multiplied without AMX, since the system refuses its registers: Operation not permitted"
    ]


def test_nobody_is_asked_for_registers_that_are_not_there_or_not_wanted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine_with(monkeypatch, *SAPPHIRE_RAPIDS[:3], refusal="asked")
    machine_with(monkeypatch, *SAPPHIRE_RAPIDS, limit="AVX512_CORE_BF16", refusal="asked")
    assert not caplog.messages


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="a call of Linux on x86-64"
)
def test_the_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    if HERE is not None and HERE.amx is not None:
        assert instructions.ask_for_tiles() is None
    monkeypatch.setattr(instructions, "ASK_FOR_TILES", (158, 0x1023, 63))  # there is no such register
    assert instructions.ask_for_tiles() in ("Invalid argument", "Operation not supported")


def test_elsewhere_the_reason_is_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions.sys, "platform", "win32")
    assert instructions.ask_for_tiles() == "they are asked for on Linux only, and this is win32"


def test_all_eight_tiles_are_configured_to_16_rows_of_64_bytes() -> None:
    assert len(CONFIGURATION) == 64
    assert CONFIGURATION[:2] == bytes([1, 0])  # palette, first row
    assert CONFIGURATION[16:48] == bytes([64, 0] * 8 + [0] * 16)
    assert CONFIGURATION[48:] == bytes([16] * 8 + [0] * 8)


def assembly(packing: Packing, names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Loops of a packing in the machine's language."""
    written = []

    def engine(compiled: binding.ModuleRef, target: binding.TargetMachine) -> SimpleNamespace:
        written.append(target.emit_assembly(compiled))
        return SimpleNamespace(finalize_object=lambda: None)

    monkeypatch.setattr(binding, "create_mcjit_compiler", engine)
    for name in names:
        code._compiled(str(Library(packing)._written(name)), packing.machine)
    return "\n".join(written)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="LLVM's code for x86-64")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_four_tiles_are_read_for_four_products_and_nothing_else(
    gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = Machine("sapphirerapids", "", 64, 32, pairs=True, amx=AMX())
    dots = [f"dot{epilogue}" for epilogue in (GATED if gated else PLAIN)]
    text = assembly(Packing(768, 96, HALF, processor), [*dots, *WRITERS], monkeypatch)
    _, *parts = re.split(r"^([a-z]\w*):", text, flags=re.MULTILINE)
    functions = dict(zip(parts[::2], parts[1::2], strict=True))
    multiplying = {name.removesuffix("_expert") for name, own in functions.items() if "tdpbf16ps" in own}
    assert multiplying == {"scatter", "weights", *dots}
    blocks = [block for block in text.split("\n.LBB") if "tdpbf16ps" in block]
    inner = [block.split("\n\tj")[0] for block in blocks]
    for block in inner:
        products = block.count("tdpbf16ps")
        assert products in (2, 4)  # of one row of tiles and of two
        assert block.count("tileloadd") == {2: 3, 4: 4}[products]
        spills = [line for line in block.splitlines() if "mov" in line and re.search(r"\(%r[bs]p\)", line)]
        assert not spills, spills  # what `dot` copies of the next rows has addresses of its own
    assert any(block.count("tdpbf16ps") == 4 for block in inner)
    assert "vdpbf16ps" not in text
    assert text.count("ldtilecfg") == text.count("tilerelease") == (8 if gated else 6)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine with emulated tiles, none of which are used wrongly."""
    assert HERE is not None
    monkeypatch.setattr(fused, "this_machine", lambda: replace(HERE, amx=EMULATED))
    always_in_tiles(monkeypatch)
    before = EMULATED.products
    yield
    assert EMULATED.products > before
    assert EMULATED.faults == 0


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_threads_and_repetition_do_not_change_a_bit(gated: bool) -> None:
    case = Case(1301, 64, 24, experts=8, dtype=HALF, gated=gated)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(outcome(problem(case), "fused"))
    torch.set_num_threads(before)
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("neurons", [8, 24, 40, 96])
def test_what_another_call_left_in_memory_is_in_no_sum(neurons: int) -> None:
    case = Case(77, 64, neurons, experts=4, dtype=HALF)
    found, spoilt = problem(case), problem(replace(case, experts=8))  # with room for more
    wanted = outcome(found, "fused")
    with torch.no_grad():
        spoilt.leaves["up"].fill_(torch.nan)
    outcome(spoilt, "fused")
    for name, got in outcome(found, "fused").items():
        assert got.isfinite().all(), name
        assert torch.equal(got, wanted[name]), name


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("last", "wanted"), [(1.0, 33 * 32.0), (torch.inf, torch.inf)])
def test_a_gradient_of_33_tokens_is_filled_up_with_zeros_only(last: float, wanted: float) -> None:
    found = problem(Case(33, 32, 16, experts=1, chosen=1, dtype=HALF, bias=False))
    with torch.no_grad():
        for leaf in found.leaves.values():
            leaf.fill_(1)
        found.x[32] = last
    (gradient,) = torch.autograd.grad(found.run("fused").sum(), [found.leaves["up"]])
    assert (gradient == wanted).all()


def test_few_tokens_and_tiny_experts_are_multiplied_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replace(HERE, amx=EMULATED)
    assert suited(machine, 8, 128.0).amx == suited(machine, 32, 32.0).amx == EMULATED
    assert (
        suited(machine, 8, 127.0).amx is suited(machine, 32, 31.0).amx is suited(machine, 7, 1e6).amx is None
    )
    monkeypatch.setattr(fused, "this_machine", lambda: machine)

    def products(tokens: int, learns: bool) -> int:
        before = EMULATED.products
        with torch.set_grad_enabled(learns):
            problem(Case(tokens, 64, 16, experts=4, chosen=2, dtype=HALF)).run("fused")
        return EMULATED.products - before

    for learns in (False, True):  # an expert has half of the tokens
        assert products(126, learns) == 0
        assert products(128, learns) > 0


def test_without_amx_no_tile_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    always_in_tiles(monkeypatch)
    before = EMULATED.products
    case = Case(77, 64, 24, experts=4, dtype=HALF)
    machines = (
        replace(HERE, amx=None),
        replace(HERE, pairs=False, amx=EMULATED),
        replace(HERE, vector_bytes=32, registers=16, amx=EMULATED),
    )
    for machine in machines:
        monkeypatch.setattr(fused, "this_machine", lambda machine=machine: machine)
        outcome(problem(case), "fused")
    monkeypatch.setattr(fused, "this_machine", lambda: replace(HERE, amx=EMULATED))
    for other in (replace(case, neurons=7), replace(case, dtype=torch.float32)):
        outcome(problem(other), "fused")
    assert EMULATED.products == before
