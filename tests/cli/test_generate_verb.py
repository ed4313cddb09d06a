"""`switchable generate` as a user meets it: what it prints, and what it refuses."""

from __future__ import annotations

import pytest
from cli.commands import Command, refused


@pytest.mark.parametrize(
    "extra",
    [
        ["--mode", "dense"],
        ["--mode", "sparse", "--experts-per-token", "2"],
        ["--mode", "sparse", "--weights", "int8", "--stop", "no such text"],
        ["--mode", "sparse", "--experts-per-token", "4", "--mass", "0.5"],
        ["--weights", "bfloat16"],
    ],
)
def test_generate(here: Command, extra: list[str]) -> None:
    done = here("generate", "run", "--prompt", "the cat", "--max-new-tokens", "5", *extra)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat")
    assert len(done.stdout.strip()) > len("the cat")
    if "--mass" in extra:
        assert "K=up to 4 of 8 experts, those whose shares add up to 0.5" in done.stderr
    width = extra[extra.index("--weights") + 1] if "--weights" in extra else "float32"
    assert f"in {width}: 5 tokens" in done.stderr


def test_generate_takes_several_prompts(here: Command) -> None:
    done = here("generate", "run", "--prompt", "the cat", "a", "--max-new-tokens", "5")
    first, second = done.stdout.split("\n\na")
    assert first.startswith("the cat")
    assert second.strip()
    assert "10 tokens" in done.stderr


def test_generate_refuses_what_it_cannot_do(here: Command) -> None:
    refused(here("generate", "nowhere"), "nowhere does not exist")
    refused(here("generate", "run", "--mode", "sparse", "--experts-per-token", "9"), "from 1 to 8")
    refused(here("generate", "run", "--prompt", "the cat sat " * 50), "no room for an answer")
    refused(here("generate", "run", "--max-new-tokens", "0"), "max_new_tokens=0")
    refused(here("generate", "run", "--temperature", "-1"), "temperature=-1")
    refused(here("generate", "run", "--weights", "int4"), "choose from", "int8")
    both = ("--weights", "int8", "--precision", "float32")
    refused(here("generate", "run", *both), "--weights int8 and --precision float32 differ")
    refused(here("generate", "run", "--stop", ""), "--stop '' would end every text at once")
    refused(here("generate", "run", "--mode", "sparse", "--mass", "1.5"), "mass=1.5 is out of range")
    refused(
        here("generate", "run", "--experts-per-token", "2", "--mass", "0.9"),
        "--experts-per-token and --mass would change nothing in dense mode; add --mode sparse",
    )
