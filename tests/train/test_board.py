"""What a run has shown: the points of an interrupted and resumed run are those of an undisturbed one, none twice."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from support import small_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from switchable.files import read_records
from switchable.store.rundir import RunDir
from switchable.train.board import Board
from switchable.train.log import RunLog
from switchable.train.loop import Trainer
from switchable.train.pretrain import pretrain, resume


def shown(folder: Path) -> dict[str, list[int]]:
    """Tag -> steps, as TensorBoard itself reads the folder."""
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [point.step for point in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def written(folder: Path) -> Counter[tuple[str, int]]:
    """How often each point stands in the files, for readers that do not know of resumed runs."""
    events = (
        Event.FromString(data) for path in folder.iterdir() for data in RawEventFileLoader(str(path)).Load()
    )
    return Counter((value.tag, event.step) for event in events for value in event.summary.value)


def values(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value and the time it was written at."""
    found = EventAccumulator(str(folder)).Reload()
    return {
        tag: {point.step: (point.value, point.wall_time) for point in found.Scalars(tag)}
        for tag in found.Tags()["scalars"]
    }


def test_points_up_to_the_step_stay_and_later_ones_go(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    for step in (1, 2, 3):
        board.add(step, {"a": step / 2, "b": -step})
    before = values(tmp_path)  # not closed: nothing waits in memory for a kill to lose it
    board.close()
    with next(tmp_path.iterdir()).open("ab") as file:
        file.write(b"\x18\x00\x00")  # the beginning of a record that a kill cut off
    board = Board(tmp_path, 2)
    board.add(3, {"a": 7.0, "b": 8.0})
    board.close()
    again = Board(tmp_path, 2)  # resumed from the same step once more
    again.add(4, {"a": 9.0, "b": 9.0})
    again.close()
    assert shown(tmp_path) == {"a": [1, 2, 4], "b": [1, 2, 4]}
    assert set(written(tmp_path).values()) == {1}
    after = values(tmp_path)
    assert all(after[tag][step] == before[tag][step] for tag in "ab" for step in (1, 2))
    assert len(list(tmp_path.iterdir())) == 1


def test_files_of_torchs_writer_are_taken_over(tmp_path: Path) -> None:
    """What version 0.2 wrote: another file per life, which says at which step it begins."""
    from torch.utils.tensorboard import SummaryWriter

    for number, (purge, steps) in enumerate(((None, (1, 2, 3)), (3, (4, 5)))):
        with SummaryWriter(str(tmp_path / "lives"), purge_step=purge, filename_suffix=f".{number}") as writer:
            for step in steps:
                writer.add_scalar("a", float(step), step)
    Board(tmp_path / "lives", 4).close()
    assert shown(tmp_path / "lives") == {"a": [1, 2, 3, 4]}


@pytest.mark.parametrize("at", [10, 13], ids=["after a checkpoint", "between checkpoints"])
def test_a_killed_and_resumed_run_shows_the_points_of_an_undisturbed_one(
    corpus: Path, tmp_path: Path, at: int
) -> None:
    config = small_run(corpus)
    pretrain(config, tmp_path / "whole", tmp_path / "cache", quiet=True)
    pid = os.fork()
    if pid == 0:  # the run of a process that dies without a word
        step = Trainer._step

        def die(self: Trainer) -> None:
            if self.counters.steps == at:
                os._exit(0)
            step(self)

        Trainer._step = die  # type: ignore[method-assign]
        pretrain(config, tmp_path / "run", tmp_path / "cache", quiet=True)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    resume(tmp_path / "run", {}, tmp_path / "cache", quiet=True)
    whole, parts = RunDir(tmp_path / "whole"), RunDir(tmp_path / "run")
    assert shown(parts.tensorboard) == shown(whole.tensorboard)
    assert shown(whole.tensorboard)["eval/val_loss_dense"] == [10, 20]
    assert set(written(parts.tensorboard).values()) == {1}
    lines = [
        [(record["kind"], record["step"]) for record in read_records(run.metrics)] for run in (whole, parts)
    ]
    assert lines[0] == lines[1]


def test_a_run_that_goes_back_keeps_no_checkpoint_of_the_steps_it_makes_again(
    corpus: Path, tmp_path: Path
) -> None:
    """Else the next resume would take one of them, and the lines between would be lost."""
    config = small_run(corpus, keep=2, snapshots=3)
    pretrain(config, tmp_path / "run", tmp_path / "cache", quiet=True)
    rundir, step = RunDir(tmp_path / "run"), Trainer._step
    assert rundir.steps() == [15, 20]

    def crash(self: Trainer) -> None:
        step(self)
        raise RuntimeError("crash")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", crash)
        with pytest.raises(RuntimeError, match="crash"):
            resume(tmp_path / "run", {}, tmp_path / "cache", resume_from="step-000015", quiet=True)
    assert rundir.steps() == [15]
    assert max(record["step"] for record in read_records(rundir.metrics)) == 15
    resume(tmp_path / "run", {}, tmp_path / "cache", quiet=True)
    assert rundir.steps() == [15, 20]
    assert shown(rundir.tensorboard)["train/loss"] == [4, 8, 12, 16, 20]


def test_a_full_disk_does_not_hide_in_a_thread(tmp_path: Path) -> None:
    log = RunLog(RunDir(tmp_path), 10)
    with Path("/dev/full").open("w") as full:
        log._board.close()
        log._board._file = full.buffer  # type: ignore[assignment]
        log._board._writer._writer = full.buffer
        with pytest.raises(OSError, match="No space left"):
            log.evaluation(5, {"val_loss_dense": 1.0, "val_loss_sparse": None}, {})
        with pytest.raises(OSError, match="No space left"):
            log.close()
    assert read_records(tmp_path / "metrics.jsonl")[0]["val_loss_dense"] == 1.0
