"""A run's curves for TensorBoard: one event file, in which every point stands once, however often the run was resumed.

    events.out.tfevents.step-000000120     what was shown up to step 120, copied, and what came after

A process that is killed loses no point. (torch's own writer keeps points for minutes in a thread,
which a kill loses and a full disk ends with a traceback.)
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars

from switchable.files import remove, whole_file
from switchable.switching.monitor import LayerMeasures

FILES = "events.out.tfevents."  # prefix of the names by which TensorBoard knows its files

_MEASURES = [f.name for f in fields(LayerMeasures) if not f.name.endswith("_by_k")]
CHARTS = {
    "loss": {"loss": ["Multiline", ["train/loss", "eval/val_loss_"]]},
    "layers": {name: ["Multiline", [f"{name}/"]] for name in ("sparse_steps", "active_steps", *_MEASURES)},
}
"""TensorBoard's tab "Custom Scalars": all tags that begin so in one chart, which is all layers of a measure."""


class Board:
    """Writes curves into a folder (made if it is missing), in which the points up to a step stay."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        before = sorted(folder.glob(f"{FILES}*"))
        path = folder / f"{FILES}step-{step:09d}"
        with whole_file(path) as temporary, temporary.open("wb") as file:
            writer = RecordWriter(file)
            writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            # A TensorBoard that is looking on forgets what it has seen, and sees it again here.
            writer.write(Event(session_log=SessionLog(status=SessionLog.START)).SerializeToString())
            if not before:
                layout = custom_scalars(CHARTS)  # type: ignore[no-untyped-call]
                writer.write(Event(summary=layout).SerializeToString())
            for event in _points(before, step):
                writer.write(event.SerializeToString())
        for old in before:
            if old != path:
                remove(old)
        self._file = path.open("ab")
        self._writer = RecordWriter(self._file)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve; OSError if the disk is full."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=points))
        self._writer.write(event.SerializeToString())
        self._file.flush()

    def sync(self) -> None:
        """Return when every point is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _points(files: list[Path], step: int) -> list[Event]:
    """Return the points up to a step: where a file begins with the start of a resumed run, later ones were undone."""
    kept: list[Event] = []
    for file in files:
        for event in map(Event.FromString, RawEventFileLoader(str(file)).Load()):
            if event.HasField("session_log"):
                kept = [point for point in kept if point.step <= event.step]
            if event.HasField("summary") and event.step <= step:
                kept.append(event)
    return kept
