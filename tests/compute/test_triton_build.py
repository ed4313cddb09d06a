"""The Triton kernels can be built for GPUs that are not here, and what is said of them is counted right."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from benchmarks.ffn_cuda_build import CASES, GPUS, KIB, MAIN, Built, faults, line

FITS = Built(
    "up_kernel", "a", {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}, 4, 3, 96 * KIB, 114, 0, 2, "HGMMA", 9
)
TOO_LARGE = Built("up_kernel", "a", {"BLOCK_M": 128}, 8, 4, 192 * KIB)


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "blocks"),
    [
        (90, 64, 64 * KIB, 4, 3),  # 228 // 65 of shared memory, 65,536 // 2,048 // 4 = 8 of registers
        (90, 184, 16 * KIB, 8, 1),  # 65,536 // 5,888 = 11 warps
        (90, 33, 0, 4, 12),  # registers in units of 256: 65,536 // 1,280 = 51 warps
        (90, 16, 0, 16, 4),  # 64 warps
        (89, 16, 0, 16, 3),  # 48 warps
    ],
)
def test_blocks_on_a_multiprocessor_by_hand(
    capability: int, registers: int, shared: int, warps: int, blocks: int
) -> None:
    assert GPUS[capability].blocks(registers, shared, warps) == blocks


def test_what_counts_as_a_fault() -> None:
    plain = Built("up_kernel", "a", {"BLOCK_M": 64}, 4, 3, 0, 32, 0, 8, None, 9)
    assert faults(MAIN, [FITS, TOO_LARGE]) == []
    assert "no block sizes of up_kernel fit" in faults(MAIN, [TOO_LARGE])[0]
    assert "without tensor cores" in faults(MAIN, [FITS, plain])[0]
    assert faults(CASES[-1], [plain]) == []  # float32, exactly
    assert faults(MAIN, [Built("combine_kernel", "a", {}, 4, 3, 0, 32, 0, 8, None, 9)]) == []


def test_a_line_of_the_table() -> None:
    assert " ".join(line(FITS).split()) == "up_kernel 64 x 128 x 32 4 3 114 0 96 2 HGMMA"
    assert " ".join(line(TOO_LARGE).split()) == "up_kernel 128 8 4 does not fit 192"


def test_forward_and_backward_are_built_for_an_h100(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.ffn_cuda_build", "--quick"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["capability"] == 90
    assert report["faults"] == []
    built = [b for b in report["built"] if b["kernel"] in ("up_kernel", "down_kernel", "hidden_grad_kernel")]
    assert {b["blocks"]["BLOCK_M"] for b in built} == {64, 128}
    assert {b["tensor_cores"] for b in built} == {"HGMMA"}  # Hopper's own, for 64 rows and more
    assert max(b["spilled"] for b in report["built"]) <= 16
    assert list(tmp_path.iterdir()) == []  # what was tuned by no clock is not remembered
