"""Memory of a process that writes text in sparse mode, at its peak: float32 against 8 bits.

    python -m benchmarks.memory [--d-model 768] [--num-layers 12] [--vocab-size 50257] [--tokenizer FOLDER]

A GPT-2 with random weights, 6 of 32 experts, 30 tokens by `switchable generate`. Peak: the resident memory that the
system has counted, imports and mapped files included. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks._models import random_gpt2
from switchable.data.corpora import documents
from switchable.data.tokenizers import load_tokenizer, train_bpe
from switchable.store.checkpoint import save
from switchable.store.export import export

MEASURED = """
import sys
from switchable.cli import main
status = main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""
"""Linux alone. What `wait4` says of a process is at least what its parent has."""
GENERATE = (
    "generate",
    "--prompt",
    "The history of",
    "--mode",
    "sparse",
    "--max-new-tokens",
    "30",
    "--temperature",
    "0",
)


def main(argv: list[str] | None = None) -> int:
    """Build the model, write with it and print what that took."""
    parser = argparse.ArgumentParser(
        description="Peak memory of switchable generate in float32 and in 8 bits."
    )
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument(
        "--tokenizer", help="folder of the model's; default: one trained on Python's own files"
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        sizes = (args.d_model, args.num_layers, args.vocab_size)
        _build(Path(place), *sizes, args.tokenizer)
        found = {
            "float32": peak_mb(place + "/run", "float32"),
            "int8": peak_mb(place + "/run", "int8"),
            "int8_export": peak_mb(place + "/export", "int8"),
        }
    for name, megabytes in found.items():
        print(f"{name:12} {megabytes:7,.0f} MB, {megabytes / found['float32']:.2f} of float32's")
    print(json.dumps(report(found) | dict(zip(("d_model", "num_layers", "vocab_size"), sizes, strict=True))))
    return 0


def report(found: dict[str, float]) -> dict[str, float]:
    """Return peaks in MB by name, and those of 8 bits over float32's."""
    ratios = {f"{name}_over_float32": found[name] / found["float32"] for name in found if name != "float32"}
    return {f"{name}_mb": megabytes for name, megabytes in found.items()} | ratios


def peak_mb(folder: str, weights: str) -> float:
    """Return the most resident memory of a process that writes, in MB of 10^6 bytes."""
    call = [sys.executable, "-c", MEASURED, *GENERATE, folder, "--weights", weights]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"benchmarks.memory: {' '.join(call[2:])} failed")
    return int(done.stdout.splitlines()[-1]) * 1024 / 1e6


def _build(place: Path, d_model: int, num_layers: int, vocab_size: int, tokenizer_folder: str | None) -> None:
    if tokenizer_folder is None:
        tokenizer = train_bpe(documents([]), min(vocab_size, 4096))
    else:
        tokenizer = load_tokenizer(tokenizer_folder)
    save(place / "run", random_gpt2(d_model, num_layers, vocab_size, 1024, 32, 6), tokenizer=tokenizer)
    export(place / "run", "sparse", place / "export", weights="int8")


if __name__ == "__main__":
    sys.exit(main())
