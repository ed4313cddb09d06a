"""Everything that only a GPU can tell, in one go: `make gpu`.

    python -m benchmarks.gpu

The tests of the CUDA backends on the GPU; `ffn_cuda`, which tunes the Triton kernels, times the FFNs and says which
backend is best at which size; training steps of `train_step`; decoding as `decode` times it. All in bfloat16. What was
found is written to benchmarks/results/DATE-GPU.json. Nothing is written when anything fails. Without a GPU it says so
in one line and exits 2.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks._models import decoding_parity_error, random_gpt2
from benchmarks.decode import EXPERTS, POSITIONS, VOCABULARY, K, tokens_per_second
from switchable.files import write_json

RESULTS = Path(__file__).parent / "results"
TESTS = ["tests/compute/test_triton.py", "tests/compute/test_grouped_mm.py", "tests/compute/test_choose.py"]
PARITY = 3e-2  # relative error of logits; bfloat16 has 8 bits


def succeed(*arguments: str) -> list[str]:
    """Run a module of Python, show what it says, and return its lines; end with its code where that is not 0."""
    print(f"--- {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=RESULTS.parents[1]) as process:
        assert process.stdout
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(process.returncode)
    return lines


def decoding() -> dict[str, Any]:
    """Return tokens per second of GPT-2 small in both modes."""
    model = random_gpt2(768, 12, VOCABULARY, POSITIONS, EXPERTS, K).eval().to("cuda", torch.bfloat16)
    error = decoding_parity_error(model, torch.arange(1, 9, device="cuda").view(1, 8))
    if not error < PARITY:
        sys.exit(
            f"sparse mode with all experts on is off by {error:.1e}, allowed is {PARITY:.0e}: nothing is written"
        )
    rate = tokens_per_second(model, 128, rounds=9)
    print(f"--- decoding, tokens per second: {rate}", flush=True)
    return {"tokens_per_second": rate, "decode_speedup": rate["sparse"] / rate["dense"], "parity": error}


def main() -> int:
    """Test, measure, write; return the exit code."""
    if not torch.cuda.is_available():
        print(f"make gpu needs a CUDA GPU, and torch {torch.__version__} sees none here", file=sys.stderr)
        return 2
    succeed("pytest", "-n", "0", "-q", *TESTS)
    found = {
        "ffn": json.loads(succeed("benchmarks.ffn_cuda", "--kernels")[-1]),
        "train_step": json.loads(
            succeed("benchmarks.train_step", "--precision", "bfloat16", "--device", "cuda")[-1]
        ),
        "decode": decoding(),
    }
    gpu = torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = RESULTS / f"{datetime.datetime.now(datetime.UTC).date()}-{name}.json"
    write_json(path, {"benchmark": "gpu", "device": gpu, "torch": torch.__version__, **found})
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
