"""The command line: what a user types, what they see, and what wrong input does.

What is refused, or answered at once, is asked of `main` in this process: one of its own takes seconds to start.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from switchable.cli import main
from switchable.config import load, to_dict

SMALL = """
model: {d_model: 16, num_layers: 2, num_heads: 2}
data: {vocab_size: 300}
train: {steps: 12, batch_size: 4, sequence_length: 16, log_every: 4, eval_every: 0, checkpoint_every: 4,
        eval_tokens: 256, probe_tokens: 128, threads: 1}
switch: {recipe: early, num_experts: 8, experts_per_token: 3, monitor_every: 3,
         stability_threshold: 0.0, max_activation_ratio: 1.0, min_mass_caught: 0.0, sparse_steps: 2}
"""


Command = Callable[..., subprocess.CompletedProcess[str]]


def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "switchable", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(tmp_path),
    )


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = start(tmp_path, *arguments)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.yaml and a finished run."""
    base = tmp_path_factory.mktemp("cli")
    (base / "small.yaml").write_text(SMALL)
    done = run(base, "pretrain", "small.yaml", "--data", str(corpus), "--out", "run")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    needed = {
        "val_loss_dense",
        "val_loss_sparse",
        "flops_ratio",
        "sparse_fraction",
        "switches",
        "step_speedup_sparse",
    }
    assert needed <= figures.keys()
    assert figures["switches"] >= 2
    return base


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Gives commands in this process, in the folder of the finished run."""
    monkeypatch.chdir(trained)
    monkeypatch.setenv("XDG_CACHE_HOME", str(trained / "cache"))

    def give(*arguments: str) -> subprocess.CompletedProcess[str]:
        try:
            code = main(list(arguments))
        except SystemExit as left:
            code = int(left.code or 0)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return give


def test_a_run_leaves_what_it_promises(trained: Path) -> None:
    left = {p.name for p in (trained / "run").iterdir()}
    promised = {
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "final",
        "curves.png",
        "summary.json",
    }
    assert promised <= left
    assert (trained / "run/curves.png").read_bytes().startswith(b"\x89PNG")
    assert any((trained / "run/tensorboard").glob("events.*"))
    assert not list((trained / "run").rglob(".tmp-*"))


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


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The error is for a user: exit code 2, a line or two, no traceback, and it says these words."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()
    assert len(message) <= 2, done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere.txt"], ["nowhere.txt"]),
        (["--num-experts", "10"], ["num_experts=10 does not divide d_ff=64", "use one of"]),
        (["--experts-per-token", "9"], ["experts_per_token=9", "use 1 to 8"]),
        (
            ["--sequence-length", "64", "--set", "max_positions=32"],
            ["sequence_length=64", "max_positions=32"],
        ),
        (["--set", "beta3=0.9"], ["no setting 'beta3'", "did you mean 'beta2'"]),
        (["--set", "beta2"], ["give NAME=VALUE"]),
        (["--set", "beta2=1.5"], ["beta2=1.5 is out of range"]),
        (["--seed", "-1"], ["seed=-1 is out of range"]),
        (["--step", "3"], ["'--step' is not known; did you mean '--steps'?"]),
        (["--schedule", "dense"], ["'--schedule' is gone; use recipe dense"]),
        (["--steps", "many"], ["steps='many' must be a whole number"]),
        (["--optimizer", "adam"], ["optimizer='adam'", "adamw"]),
        (["--device", "tpu9"], ["device='tpu9'"]),
        (["--batch-size", "100000"], ["shorter than one batch"]),
        (["--out", "small.yaml"], ["small.yaml", "output folder"]),
        (["--backend", "fuesd"], ["'fuesd'", "did you mean 'fused'"]),
        (["--num-heads", "3"], ["num_heads=3 does not divide d_model=16"]),
    ],
)
def test_wrong_settings(
    here: Command, trained: Path, corpus: Path, arguments: list[str], words: list[str]
) -> None:
    given = arguments if "--data" in arguments else ["--data", str(corpus), *arguments]
    out = [] if "--out" in arguments else ["--out", "refused"]
    refused(here("pretrain", "small.yaml", *given, *out), *words)
    assert not (trained / "refused/config.yaml").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ["empty"]),
        ("one.txt", b"just one document", ["one-document corpus", "--document-separator"]),
        ("latin.txt", b"caf\xe9", ["UTF-8"]),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', ["broken.jsonl", "line 2"]),
    ],
)
def test_wrong_text(here: Command, trained: Path, name: str, content: bytes, words: list[str]) -> None:
    (trained / name).write_bytes(content)
    refused(here("pretrain", "small.yaml", "--data", name, "--out", "refused"), *words)


def test_an_unknown_key_names_the_nearest(here: Command, trained: Path) -> None:
    (trained / "wrong.yaml").write_text("train: {learning_rat: 1}\n")
    refused(here("pretrain", "wrong.yaml"), "'learning_rat'", "did you mean 'learning_rate'?")


def test_a_folder_that_holds_a_run_is_not_overwritten(here: Command, trained: Path, corpus: Path) -> None:
    before = (trained / "run/summary.json").read_text()
    done = here("pretrain", "small.yaml", "--data", str(corpus), "--out", "run")
    refused(done, "holds a run already", "--resume", "--overwrite")
    assert (trained / "run/summary.json").read_text() == before


def test_resume_with_other_settings_is_refused(here: Command) -> None:
    refused(here("pretrain", "--out", "run", "--resume", "--d-model", "32"), "model.d_model: 16 -> 32")
    refused(here("pretrain", "--out", "nothing", "--resume"), "no run to resume")
    refused(
        here("pretrain", "--out", "run", "--resume-from", "step-7"),
        "no checkpoint 'step-7'",
        "step-000004",
    )


def test_resume_with_changed_text_is_refused(here: Command, trained: Path, tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " + "with words " * 50)
    first = run(trained, "pretrain", "small.yaml", "--data", str(tmp_path), "--out", "changing")
    assert first.returncode == 0, first.stderr
    (tmp_path / "0.txt").write_text("something else " * 50)
    refused(
        here("pretrain", "--out", "changing", "--resume", "--quiet"),
        "changed since",
        " documents, ",
        "; now ",
    )


def test_a_damaged_checkpoint_is_named_and_the_good_one_used_when_asked_for(
    here: Command, trained: Path, corpus: Path
) -> None:
    done = run(trained, "pretrain", "small.yaml", "--data", str(corpus), "--out", "damaged")
    assert done.returncode == 0, done.stderr
    newest = trained / "damaged/checkpoints/step-000012/model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-9] ^= 1
    newest.write_bytes(bytes(content))
    said = here("pretrain", "--out", "damaged", "--resume")
    refused(said, "model.safetensors does not have its checksum", "--resume-from step-000008")
    again = run(trained, "pretrain", "--out", "damaged", "--resume", "--resume-from", "step-000008")
    assert again.returncode == 0, again.stderr
    first, second = (json.loads(r.stdout.splitlines()[-1]) for r in (done, again))
    assert second["val_loss_sparse"] == first["val_loss_sparse"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(
    here: Command, trained: Path, corpus: Path, signum: int, code: int
) -> None:
    out = f"stopped{signum}"
    process = start(
        trained, "pretrain", "small.yaml", "--data", str(corpus), "--out", out, "--steps", "100000",
        "--checkpoint-every", "100000",
    )  # fmt: skip
    metrics = trained / out / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    refused(here("pretrain", "small.yaml", "--data", str(corpus), "--out", out), "in use by another run")
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert f"go on with: switchable pretrain --out {out} --resume" in err
    assert len(list((trained / out / "checkpoints").glob("step-*"))) == 1


def test_generate_refuses_what_it_cannot_do(here: Command) -> None:
    refused(here("generate", "nowhere"), "nowhere does not exist")
    refused(here("generate", "run", "--mode", "sparse", "--experts-per-token", "9"), "use 1 to 8")
    refused(here("generate", "run", "--prompt", "the cat sat " * 50), "no room for an answer")
    refused(here("generate", "run", "--max-new-tokens", "0"), "max_new_tokens=0")
    refused(here("generate", "run", "--temperature", "-1"), "temperature=-1")
    refused(here("generate", "run", "--weights", "int4"), "choose from", "int8")
    both = ("--weights", "int8", "--precision", "float32")
    refused(here("generate", "run", *both), "--weights int8 and --precision float32 differ")
    refused(here("generate", "run", "--stop", ""), "--stop '' would end every text at once")
    refused(here("generate", "run", "--mass", "1.5"), "mass=1.5 is out of range")


def help_of(verb: str) -> str:
    """The help of a verb, each flag's text in one line."""
    text = subprocess.run(
        [sys.executable, "-m", "switchable", verb, "--help"], capture_output=True, text=True, check=True
    ).stdout
    return re.sub(r"\n {20,}", " ", text)


def test_help_states_the_defaults_of_a_run_started_without_flags() -> None:
    sections = to_dict(load(None, {"precision": "float32"}))
    config = {name: value for values in sections.values() for name, value in values.items()}
    flags = re.findall(r"(?m)^  --([a-z0-9-]+)(.*)$", help_of("pretrain"))
    assert len(flags) <= 50
    seen = set()
    for flag, text in flags:
        name = flag.replace("-", "_")
        if name not in config:
            continue  # of the verb, not of the run
        seen.add(name)
        said = re.search(r"\(default:? (?:the recipe's; in float32 auto's is )?(.*)\)$", text.strip())
        if name in ("recipe", "precision"):
            assert said is not None
            assert said[1] == "auto"
        elif said is None:
            assert config[name] in (None, [], ()), name
        else:
            assert said[1] == str(config[name]), name
    (others,) = re.findall(r"(?m)^  --set .*YAML file: (.*)$", help_of("pretrain"))
    assert seen | set(others.split(", ")) == set(config)


@pytest.mark.parametrize("arguments", [["pretrain", "--bad"], ["pretrain", "--steps", "many"], ["--help"]])
def test_typing_errors_are_answered_before_torch_is_loaded(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom switchable.cli import main\n"
        f"try:\n    code = main({arguments!r})\nexcept SystemExit as error:\n    code = error.code\n"
        "assert 'torch' not in sys.modules and 'llvmlite' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr


def test_reading_settings_compiles_no_kernel() -> None:
    code = (
        "from llvmlite import binding\nfrom switchable.config import load\n"
        "def fail(*_): raise AssertionError('compiled')\nbinding.create_mcjit_compiler = fail\n"
        "print(load(None, {'precision': 'float32'}).switch.recipe)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_that_are_not_utf8(here: Command, trained: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    folder = tmp_path / odd
    folder.mkdir()
    for i in range(30):
        Path(folder, os.fsdecode(b"\xff") + f"{i}.txt").write_text(f"document {i} " + "with words " * 50)
    for place in ("--out", "--cache"):
        command = ["small.yaml", "--data", str(folder), "--out", "odd", place, odd]
        refused(here("pretrain", *command), r"the name 'caf\udce9' is not UTF-8")
    assert not (trained / "odd").exists()
    done = run(trained, "pretrain", "small.yaml", "--data", str(folder), "--out", "odd")
    assert done.returncode == 0, done.stderr
    assert r"caf\udce9" in (trained / "odd/report.html").read_text(encoding="utf-8")
    done = run(trained, "pretrain", "--out", "odd", "--resume")  # its configuration names the folder
    assert done.returncode == 0, done.stderr
