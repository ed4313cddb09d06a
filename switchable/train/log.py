"""Where a run's numbers go: `metrics.jsonl` (the record), TensorBoard (live), the terminal (a bar, or lines).

Every line of metrics.jsonl has a `kind` and a `step`:

    train    loss (mean since the last line), mode, learning rate, tokens, FLOPs so far, tokens per second
    measure  the monitor's measures per layer, what was regrouped, which layers take part in sparse steps
    eval     validation loss in both modes, bits per byte; tokens, FLOPs and seconds of training so far
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from switchable import ranks
from switchable.errors import InputError
from switchable.files import as_json, is_no_space, write_text
from switchable.store.rundir import RunDir
from switchable.switching.controller import Measurement


def open_log(rundir: RunDir, total_steps: int, start_step: int, quiet: bool) -> RunLog:
    """Return the log of a run on rank 0, and one that keeps nothing on the others."""
    return (RunLog if ranks.is_main() else NoLog)(rundir, total_steps, start_step, quiet)


class RunLog:
    """Writes a run's numbers.

    Args:
        rundir: the run's folder.
        total_steps: optimizer steps of the whole run.
        start_step: steps already done; later lines of an interrupted run are dropped.
        quiet: show nothing on the terminal.
    """

    def __init__(self, rundir: RunDir, total_steps: int, start_step: int = 0, quiet: bool = False) -> None:
        if start_step:
            self._rewind(rundir, start_step)
        self._file = rundir.metrics.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(rundir.tensorboard), purge_step=start_step or None)
        self._quiet = quiet
        live = sys.stderr.isatty() and not quiet
        self._bar = tqdm(
            total=total_steps, initial=start_step, unit="step", disable=not live, dynamic_ncols=True
        )
        self._total = total_steps

    @staticmethod
    def _rewind(rundir: RunDir, step: int) -> None:
        """Drop lines after `step`, and a last line that was cut off: the resumed run writes them again."""
        if not rundir.metrics.exists():
            return
        kept = []
        for line in rundir.metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                continue
        write_text(rundir.metrics, "".join(kept))

    def advance(self, mode: str, loss: float | None, tokens_per_second: float) -> None:
        """Move the progress bar by one step."""
        if not self._bar.disable:
            shown = "" if loss is None else f" loss {loss:.3f}"
            self._bar.set_description_str(f"{mode:6}{shown} {tokens_per_second:,.0f} tok/s", refresh=False)
            self._bar.update()

    def train(self, step: int, values: dict[str, Any]) -> None:
        """Record a line of training figures."""
        self._write({"kind": "train", "step": step, **values})
        for key in ("loss", "learning_rate", "flops", "tokens_per_second", "sparse_fraction"):
            self._board.add_scalar(f"train/{key}", values[key], step)

    def measure(self, measurement: Measurement) -> None:
        """Record a measurement of the monitor."""
        layers = [dataclasses.asdict(m) for m in measurement.layers]
        self._write(
            {
                "kind": "measure",
                "step": measurement.step,
                "layers": layers,
                "regrouped": list(measurement.regrouped),
                "takes_part": list(measurement.takes_part),
                "experts_per_token": list(measurement.experts_per_token),
            }
        )
        for i, (layer, k) in enumerate(zip(layers, measurement.experts_per_token, strict=True)):
            curves = {key: value for key, value in layer.items() if not isinstance(value, tuple)}
            for key, value in {**curves, "experts_per_token": k}.items():
                if value is not None:
                    self._board.add_scalar(f"{key}/layer {i}", value, measurement.step)

    def evaluation(self, step: int, values: dict[str, Any], progress: dict[str, Any]) -> None:
        """Record a validation, and what training had cost by then, and say it on the terminal."""
        self._write({"kind": "eval", "step": step, **values, **progress})
        for key, value in values.items():
            if value is not None:
                self._board.add_scalar(f"eval/{key}", value, step)
        modes = [(mode, values[f"val_loss_{mode}"]) for mode in ("dense", "sparse")]
        shown = ", ".join(f"{mode} {loss:.4f}" for mode, loss in modes if loss is not None)
        self.say(f"step {step}/{self._total}: validation loss {shown}")

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if not self._quiet:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        self._board.close()
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(as_json(record) + "\n")
            self._file.flush()
        except OSError as error:
            if not is_no_space(error):
                raise
            raise InputError(
                f"no space left on the device while writing {self._file.name}; free some and go on with --resume"
            ) from None


class NoLog(RunLog):
    """The log of the ranks that do not write: every method does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __getattribute__(self, name: str) -> Any:
        """Return a function that does nothing, for every method."""
        return lambda *_, **__: None
