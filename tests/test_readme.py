"""What README and docs show works: README's commands on a small model, its training loop; docs' flags exist."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from support import tiny_gpt2

from switchable.cli import build_parser, main
from switchable.cli.flags import given_flags

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"(?m)^(switchable [^#\n]+?) *(?:#.*)?$", README)

SMALL = (
    "--d-model 16 --num-layers 2 --num-heads 2 --vocab-size 300 --steps 20 --batch-size 4 --sequence-length 16 "
    "--set eval_tokens=256 --threads 1 --quiet "
    # So that layers take part at once: `bench` needs some.
    "--recipe early --num-experts 8 --experts-per-token 3 --monitor-every 3 --sparse-steps 2 --stability-threshold 0 "
    "--min-dense-fraction 0.15 --final-dense-fraction 0.2 --set max_activation_ratio=1 --set min_mass_caught=0"
)
"""Given besides what the README says, so that it takes seconds."""


def test_the_commands_in_their_order(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my-texts", "wiki"):
        shutil.copytree(corpus, name)
    for name in ("my.txt", "held-out.txt"):
        shutil.copy(next(corpus.iterdir()), name)
    shutil.copytree(ROOT / "configs", "configs")
    assert len(COMMANDS) >= 12
    for command in COMMANDS:
        _bring("runs/dense/final", "path/to/checkpoint")
        _bring("runs/mine/final", "other-run/step-1")
        arguments = shlex.split(command)[1:]
        resuming = "--resume" in arguments
        if arguments[0] in ("pretrain", "compare") and not resuming:
            arguments += shlex.split(SMALL)
        if arguments[0] == "convert":
            arguments += shlex.split(
                "--num-experts 8 --calibration-tokens 2000 --eval-tokens 256 --keep-activation"
            )
        if "other-run/step*" in arguments:
            arguments[arguments.index("other-run/step*")] = "other-run/step-1"  # as the shell does
        code = main(arguments)
        assert code == 0, f"{command}: {capsys.readouterr().err}"


def test_commands_in_the_docs_have_flags_that_there_are() -> None:
    parser, _ = build_parser()
    pattern = re.compile(r"(?m)^ *(?:torchrun .* )?switchable (\w+ [^#\n]+)")
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    commands = [command for text in texts for command in pattern.findall(text.replace("\\\n", " "))]
    assert len(commands) >= 20
    for command in commands:
        args, unknown = parser.parse_known_args(shlex.split(command))
        assert not unknown, command
        given_flags(args)  # refuses a setting that there is not


def _bring(source: str, place: str) -> None:
    """Put a model where the README says that the reader has one, as soon as there is one."""
    if Path(source).is_dir() and not Path(place).exists():
        shutil.copytree(source, place)


def test_the_training_loop() -> None:
    (block,) = re.findall(r"(?s)```python\n(.*?)```", README)
    model = tiny_gpt2()
    ids = torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": ids, "labels": ids}] * 3
    names = {"model": model, "torch": torch, "probe_token_ids": ids, "batches": batches}
    exec(block, names)  # the README's own code
    assert str(names["report"]).startswith("2 of 2 FFNs are switchable")
    assert names["controller"].steps_done == 3  # type: ignore[attr-defined]
