"""Two processes train as one does: losses, switches, structures, checkpoints in any division, errors on every rank."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from launch import cli, run_ranks, start_ranks
from safetensors.torch import load_file
from torch import Tensor, nn
from train.test_loop import small

from switchable import choices, ranks
from switchable.config import to_dict
from switchable.ffn import active_training
from switchable.train import pretrain as run
from switchable.train import setup
from switchable.train.loop import Trainer
from switchable.train.parallel import process_group
from switchable.train.pretrain import pretrain

FIFTY: dict[str, Any] = {
    "train": {"steps": 50, "log_every": 1, "eval_every": 0, "checkpoint_every": 25},
    "switch": {
        "monitor_every": 10, "sparse_steps": 10, "active_below": 1.0,
    },
}  # fmt: skip


def train_small(out: Path, corpus: Path, double: bool, changes: dict[str, Any]) -> None:
    """A run of 50 steps; in float64 if `double`, the loss included (transformers' own is float32 whatever happens)."""
    merged = {section: FIFTY[section] | changes.get(section, {}) for section in FIFTY}
    with pytest.MonkeyPatch.context() as patch, process_group(60):
        patch.setattr(active_training, "LEAST_TOKENS", 8)  # so that dense steps multiply active neurons only
        if double:
            patch.setattr(setup, "convert", converted_to_double(setup.convert))
        pretrain(small(corpus, **merged), out, out.parent / "cache", quiet=True)


def converted_to_double(convert: Any) -> Any:
    def loss(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def wrapped(model: Any, *args: Any, **keywords: Any) -> Any:
        report = convert(model, *args, **keywords)
        model.double()
        model.loss_function = loss
        return report

    return wrapped


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


@pytest.fixture(scope="module", params=[True, False], ids=["float64", "float32"])
def alone(
    request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bool]:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert run_ranks(1, train_small, out, corpus, request.param, {}, log=out.parent)[0][0] == 0
    return out, request.param


@pytest.mark.parametrize(
    ("world_size", "train"),
    [
        (2, {"parallel": "ddp"}),
        (2, {"parallel": "fsdp"}),
        (2, {"parallel": "fsdp", "gradient_accumulation_steps": 2, "activation_checkpointing": True}),
        (1, {"gradient_accumulation_steps": 4}),
    ],
    ids=["ddp", "fsdp", "fsdp in micro-batches", "micro-batches"],
)
def test_the_losses_are_those_of_one_process(
    alone: tuple[Path, bool], corpus: Path, tmp_path: Path, world_size: int, train: dict[str, Any]
) -> None:
    one, double = alone
    if not double and "gradient_accumulation_steps" in train:
        pytest.skip("micro-batches are compared in float64")
    out = tmp_path / "run"
    ended = run_ranks(world_size, train_small, out, corpus, double, {"train": train}, log=tmp_path)
    assert [code for code, _ in ended] == [0] * world_size, ended
    expected, found = lines(one, "train"), lines(out, "train")
    assert len(found) == 50
    assert {line["sparse_fraction"] for line in found} == {0.0, 1.0}
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-10 if double else 1e-5), b["step"]
        assert (b["phase"], b["sparse_fraction"]) == (a["phase"], a["sparse_fraction"])
        # Each rank counts what is active of its own tokens.
        assert b["flops"] == pytest.approx(a["flops"], rel=0.01)
    for a, b in zip(lines(one, "measure"), lines(out, "measure"), strict=True):
        assert (a["takes_part"], a["regrouped"]) == (b["takes_part"], b["regrouped"])
    whole, other = (json.loads((run / "summary.json").read_text()) for run in (one, out))
    assert (whole["switches"], other["processes"]) == (other["switches"], world_size)
    assert other["switches"] >= 4
    assert other["regroupings"] == whole["regroupings"] >= 2
    # The checkpoint is the same folder, whoever wrote it: file by file, name by name.
    for file in ("model.safetensors", "switchable.tensors", "training.tensors"):
        a, b = (load_file(run / f"checkpoints/step-000050/{file}") for run in (one, out))
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            # What a router learns from is kept in float32.
            close = (1e-6 if ".router." in name else 1e-9) if double else 1e-4
            if not name.startswith("random"):
                torch.testing.assert_close(b[name], tensor, rtol=0, atol=close, msg=name)


def test_ddp_does_not_wait_for_routers_that_do_not_learn(corpus: Path, tmp_path: Path) -> None:
    changes = {"train": {"steps": 20}, "switch": {"recipe": "dense", "min_dense_fraction": 1.0}}
    ended = run_ranks(2, train_small, tmp_path / "run", corpus, False, changes, log=tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended


def leave_at_once() -> None:
    """End with the interpreter's lock held from the last collective to the end of the group, by what outlives it."""
    sys.setswitchinterval(1000.0)  # no thread takes the lock from one that does not give it up
    with process_group(60):
        replica = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
        tensors = [torch.ones(4) for _ in range(64)]
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()
        tensors.clear()
    del replica


def test_no_rank_waits_for_threads_that_wait_for_it(tmp_path: Path) -> None:
    for _ in range(3):
        assert run_ranks(2, leave_at_once, log=tmp_path, seconds=30) == [(0, "")] * 2


def test_a_run_goes_on_with_other_ranks_and_sharding(corpus: Path, tmp_path: Path) -> None:
    """Begun by two sharded ranks; gone on with by one process, four sharded ranks, and two replicas."""
    config = to_dict(small(corpus, train={"steps": 20, "log_every": 1, "eval_every": 0}))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    cache = ("--cache", str(tmp_path / "cache"), "--quiet")
    whole, out = str(tmp_path / "whole"), tmp_path / "run"
    start = ("pretrain", str(tmp_path / "run.yaml"), *cache)
    assert run_ranks(1, cli, *start, "--out", whole, log=tmp_path)[0][0] == 0
    assert run_ranks(2, cli, *start, "--out", str(out), "--parallel", "fsdp", log=tmp_path) == [(0, "")] * 2
    for world_size, parallel, step in ((1, "ddp", 10), (4, "fsdp", 15), (2, "ddp", 10)):
        again = (
            "pretrain",
            "--out",
            str(out),
            *cache,
            "--resume-from",
            f"step-{step:06d}",
            "--parallel",
            parallel,
        )
        ended = run_ranks(world_size, cli, *again, log=tmp_path)
        assert [code for code, _ in ended] == [0] * world_size, ended
        expected, found = lines(tmp_path / "whole", "train"), lines(out, "train")
        assert [line["step"] for line in found] == list(range(1, 21))
        for a, b in zip(expected, found, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
    assert not list(out.rglob(".tmp-*"))


@pytest.fixture(scope="module")
def settings(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    config = to_dict(small(corpus, train={"steps": 6, "eval_every": 0}))
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "other.yaml").write_text(yaml.safe_dump(config | {"train": config["train"] | {"seed": 1}}))
    (folder / "broken.yaml").write_text("train: {learning_rat: 1}\n")
    return folder


@pytest.mark.parametrize(
    ("world_size", "files", "extra", "words"),
    [
        (
            3,
            "run.yaml",
            [],
            ["batch_size=4 does not divide among 3 processes", "use a multiple of 3, e.g. 6"],
        ),
        (2, "run.yaml", ["--gradient-accumulation-steps", "4"], ["2 processes x 4", "multiple of 8"]),
        (2, ["run.yaml", "other.yaml"], [], ["rank 1 has train.seed=1, rank 0 has 0"]),
        (2, ["run.yaml", "broken.yaml"], [], ["learning_rat", "did you mean"]),
        (2, "run.yaml", ["--resume"], ["no run to resume"]),
        (2, "run.yaml", ["--data", "nowhere.txt"], ["nowhere.txt"]),
        (2, "run.yaml", ["--rank-timeout", "0"], ["--rank-timeout=0.0 is out of range"]),
    ],
)
def test_wrong_input_ends_every_rank_and_rank_0_says_why(
    settings: Path, tmp_path: Path, world_size: int, files: Any, extra: list[str], words: list[str]
) -> None:
    per_rank = [files] * world_size if isinstance(files, str) else files
    out, cache = str(tmp_path / "run"), str(tmp_path / "cache")
    ended = run_ranks(
        world_size, cli, "pretrain", "--out", out, "--cache", cache, "--quiet", *extra,
        per_rank=[[str(settings / name)] for name in per_rank], log=tmp_path, seconds=60,
    )  # fmt: skip
    assert [code for code, _ in ended] == [2] * world_size, ended
    assert len(ended[0][1].strip().splitlines()) <= 2, ended
    assert all(word in ended[0][1] for word in words), ended
    assert all(error == "" for _, error in ended[1:]), ended
    assert not (tmp_path / "run/config.yaml").exists()


def pretraining(settings: Path, base: Path) -> list[str]:
    """The arguments of the command."""
    return ["pretrain", f"{settings}/run.yaml", "--out", f"{base}/run", "--cache", f"{base}/cache"]


def test_what_torchrun_restarts_goes_on_only_in_a_folder_of_its_own(settings: Path, tmp_path: Path) -> None:
    given = pretraining(settings, tmp_path)
    assert run_ranks(2, cli, *given, "--quiet", log=tmp_path) == [(0, "")] * 2
    before = (tmp_path / "run/summary.json").stat().st_mtime_ns
    for launcher, codes in (("somebody else", [2, 2]), (None, [0, 0])):
        if launcher is not None:
            ours = (tmp_path / "run/launcher").read_text()
            (tmp_path / "run/launcher").write_text(launcher)
        else:
            (tmp_path / "run/launcher").write_text(ours)
        ended = run_ranks(2, restarted, *given, "--quiet", log=tmp_path)
        assert [code for code, _ in ended] == codes, ended
        assert ((tmp_path / "run/summary.json").stat().st_mtime_ns == before) == (codes == [2, 2])


def restarted(*arguments: str) -> int:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    return cli(*arguments)


def test_a_lost_rank_ends_the_other_with_a_word(settings: Path, tmp_path: Path) -> None:
    given = pretraining(settings, tmp_path)
    healthy, lost = start_ranks(2, dies_on_rank_1, *given, "--steps", "100000", log=tmp_path)
    healthy.join(60)
    lost.join(60)
    assert (healthy.exitcode, lost.exitcode) == (os.EX_TEMPFAIL, -signal.SIGKILL)
    said = (tmp_path / "stderr-0").read_text()
    assert "rank 0 lost contact with another" in said
    assert "--resume" in said
    assert "Traceback" not in said


def dies_on_rank_1(*arguments: str) -> int:
    if os.environ["RANK"] == "1":
        step = Trainer._step

        def die(self: Trainer) -> None:
            if self.counters.steps == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self)

        Trainer._step = die  # type: ignore[method-assign]
    return cli(*arguments, "--quiet")


def train_where_clocks_differ(out: Path, corpus: Path) -> None:
    """Both ranks measure; rank 0 finds bfloat16 faster, rank 1 does not."""
    trained = []
    with pytest.MonkeyPatch.context() as patch, process_group(60):
        patch.setattr(choices, "bfloat16_speedup", lambda *_: 2.0 - 1.5 * ranks.rank())
        config = small(corpus, train={"precision": "auto", "steps": 5})
        own_set_up = run.set_up
        patch.setattr(run, "set_up", lambda used, *rest: (trained.append(used), own_set_up(used, *rest))[1])
        pretrain(config, out / "run", out / "cache", quiet=True)
        chosen = [config.train.precision, trained[0].train.precision]
        (out / f"chosen-{ranks.rank()}.json").write_text(json.dumps(chosen))


def test_rank_0_chooses_for_all_what_is_left_to_the_machine(corpus: Path, tmp_path: Path) -> None:
    ended = run_ranks(2, train_where_clocks_differ, tmp_path, corpus, log=tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    found = [json.loads((tmp_path / f"chosen-{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [["bfloat16", "bfloat16"], ["float32", "bfloat16"]]
