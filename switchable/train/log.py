"""Where a run's numbers go: `metrics.jsonl` (the record), TensorBoard (live), standard error (a bar, or lines).

Every line of metrics.jsonl has a `kind` and a `step`:

    costs    what recipe `auto` weighs: seconds of each layer's ways to multiply, once, at step 0
    train    loss (mean since the last line), mode, learning rate, tokens, FLOPs so far, tokens per second; `step_ways`,
             per layer a letter for each step since the last line: d(ense), a(ctive) or s(parse)
    measure  the monitor's measures per layer, what was regrouped, which layers take part in sparse steps
    change   a layer multiplies in another way from the next step on: from, to, and why
    eval     validation loss in both modes, bits per byte; tokens, FLOPs and seconds of training so far

From step 1 on each line has `layer_ways`, how every layer multiplied in that step: "dense", "active" or "sparse".
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from switchable import ranks
from switchable.compute.measured import Costs
from switchable.files import as_json, read_records, write_text
from switchable.progress import progress_bar, say
from switchable.store.rundir import RunDir
from switchable.switching.controller import Measurement
from switchable.switching.costs import plain
from switchable.train.board import Board


def open_log(rundir: RunDir, total_steps: int, start_step: int, quiet: bool) -> RunLog:
    """Return the log of a run on rank 0, and one that keeps nothing on the others."""
    return (RunLog if ranks.is_main() else NoLog)(rundir, total_steps, start_step, quiet)


class RunLog:
    """Writes a run's numbers, after `start_step` steps; what an interrupted run wrote of later ones is dropped."""

    def __init__(self, rundir: RunDir, total_steps: int, start_step: int = 0, quiet: bool = False) -> None:
        if start_step:
            self._rewind(rundir, start_step)
        self._file = rundir.metrics.open("a", encoding="utf-8")
        self._board = Board(rundir.tensorboard, start_step)
        self.shows = not quiet
        self._bar = progress_bar("dense", "step", total_steps, self.shows, initial=start_step)
        self._total = total_steps
        self.ways: list[str] = []
        """How each layer multiplied in the step just done."""

    @staticmethod
    def _rewind(rundir: RunDir, step: int) -> None:
        """Drop lines after `step`, and a last line that was cut off: the resumed run writes them again."""
        records = read_records(rundir.metrics) if rundir.metrics.exists() else []
        kept = [json.dumps(record) + "\n" for record in records if record["step"] <= step]
        write_text(rundir.metrics, "".join(kept))

    def advance(self, mode: str, loss: float | None, tokens_per_second: float) -> None:
        """Move the progress bar by one step."""
        shown = "" if loss is None else f" loss {loss:.3f}"
        self._bar.set_description_str(f"{mode:6}{shown} {tokens_per_second:,.0f} tok/s", refresh=False)
        self._bar.update()

    def train(self, step: int, values: dict[str, Any]) -> None:
        """Record a line of training figures."""
        self._write({"kind": "train", "step": step, **values})
        shown = ("loss", "learning_rate", "flops", "tokens_per_second", "sparse_fraction")
        points = {f"train/{key}": values[key] for key in shown}
        for i, steps in enumerate(values["step_ways"]):
            shares = {way: steps.count(way[0]) / len(steps) for way in ("active", "sparse")}
            points |= {f"{way}_steps/layer {i}": share for way, share in shares.items()}
        self._board.add(step, points)

    def costs(self, found: Sequence[Costs]) -> None:
        """Record what each layer's ways to multiply cost."""
        self._write({"kind": "costs", "step": 0, "layers": plain(found)})

    def measure(self, measurement: Measurement) -> None:
        """Record a measurement of the monitor."""
        layers = [dataclasses.asdict(m) for m in measurement.layers]
        names = ("regrouped", "takes_part", "experts_per_token")
        after = {name: list(getattr(measurement, name)) for name in names}
        self._write({"kind": "measure", "step": measurement.step, "layers": layers, **after})
        for i, (layer, k) in enumerate(zip(layers, measurement.experts_per_token, strict=True)):
            curves = {key: value for key, value in layer.items() if not isinstance(value, tuple)}
            points = {f"{key}/layer {i}": value for key, value in {**curves, "experts_per_token": k}.items()}
            self._board.add(measurement.step, {tag: v for tag, v in points.items() if v is not None})
        for change in measurement.changes:
            told = {"layer": change.layer, "from": change.before, "to": change.now, "why": change.why}
            self._write({"kind": "change", "step": measurement.step, **told})

    def evaluation(self, step: int, values: dict[str, Any], progress: dict[str, Any]) -> None:
        """Record a validation, and what training had cost by then, and say it on the terminal."""
        self._write({"kind": "eval", "step": step, **values, **progress})
        self._board.add(step, {f"eval/{key}": value for key, value in values.items() if value is not None})
        modes = [(mode, values[f"val_loss_{mode}"]) for mode in ("dense", "sparse")]
        shown = ", ".join(f"{mode} {loss:.4f}" for mode, loss in modes if loss is not None)
        self.say(f"step {step}/{self._total}: validation loss {shown}")

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        say(text, self.shows)

    def sync(self) -> None:
        """Return when all that was recorded is on the disk: a checkpoint must not outlast it."""
        os.fsync(self._file.fileno())
        self._board.sync()

    def close(self) -> None:
        """Close everything, whatever fails."""
        with closing(self._board), self._file:
            self._bar.close()

    def _write(self, record: dict[str, Any]) -> None:
        ways = {"layer_ways": self.ways} if self.ways else {}
        self._file.write(as_json(record | ways) + "\n")
        self._file.flush()


class NoLog(RunLog):
    """The log of the ranks that do not write: every method does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __getattribute__(self, name: str) -> Any:
        """Return a function that does nothing, for every method."""
        return lambda *_, **__: None
