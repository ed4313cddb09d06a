"""The training loop: plain torch, read from top to bottom.

    for each step:
        forward, backward, clip, optimizer step          (in the mode the controller set)
        controller.step                                  (measure? regroup? which mode comes next?)
        once in a while: log, validate, save

Everything that continues a run bitwise is in the checkpoint; the batch of a step is a function of its number. Under
torchrun every rank runs this loop on its rows of the batch, and all do the same thing at the same step.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from switchable.data.batches import bits_per_byte
from switchable.errors import InputError
from switchable.finite import not_finite
from switchable.infer.loss import loss_in_mode
from switchable.ranks import gather, is_main, sum_over_ranks, world_size
from switchable.store import checkpoint
from switchable.store.contents import contents_of, training_state
from switchable.store.rundir import RunDir
from switchable.train.counters import Counters
from switchable.train.flops import StepFlops
from switchable.train.log import RunLog
from switchable.train.optim import clip_gradients, set_learning_rate
from switchable.train.parallel import StopVote
from switchable.train.setup import Job
from switchable.train.signals import StopRequest, TrainingStopped
from switchable.train.words import sparse_begins


class Trainer:
    """Trains a job to its last step, in a locked run folder, from where the counters stand."""

    def __init__(
        self, job: Job, rundir: RunDir, log: RunLog, flops: StepFlops, counters: Counters, stop: StopRequest
    ) -> None:
        self.job, self.rundir, self.log = job, rundir, log
        self.flops, self.counters, self.stop = flops, counters, stop
        self._vote = StopVote()
        self._window_loss = torch.tensor(counters.window_loss, device=job.device, dtype=torch.float64)
        self._shown_loss: float | None = None
        self.validation: dict[str, float | None] | None = None

    def train(self) -> None:
        """Run to the last step, or stop on request after saving (TrainingStopped).

        Raises InputError if the loss, a weight or a moment is no longer finite, or the disk is full.
        """
        train = self.job.config.train
        snapshots = snapshot_steps(train.steps, train.snapshots)
        self.job.model.train()
        while self.counters.steps < train.steps:
            self._vote.open(self.stop.signum)
            self._step()
            stopping = self._vote.close(self.stop.signum)
            done = self.counters.steps
            finished = done == train.steps
            logs = finished or done % train.log_every == 0
            evaluates = finished or (train.eval_every > 0 and done % train.eval_every == 0)
            saves = finished or stopping is not None or done % train.checkpoint_every == 0
            if logs or evaluates or saves or done in snapshots:
                self._settle()
            if logs:
                self._log_train()
            if evaluates or done in snapshots:
                self._check_weights()
            if evaluates:
                self.evaluate()
            if done in snapshots:
                self._snapshot()
            if saves:
                self.save()
            if stopping and not finished:
                raise TrainingStopped(stopping)

    def _step(self) -> None:
        """One optimizer step and what the controller does after it."""
        job, counters = self.job, self.counters
        controller = job.controller
        begin, cpu = time.perf_counter(), time.process_time()
        mode, experts = controller.mode, controller.experts_now
        self._learning_rate = set_learning_rate(job.optimizer, counters.steps, job.config.train)
        self._window_loss += update(job, counters.steps)
        self._count(mode, experts, time.perf_counter() - begin)
        begin = time.perf_counter()
        if controller.measures_next:
            self._check_loss("loss", self._loss_so_far())
            self._check_weights()
        measurement = controller.step(job.optimizer)
        if measurement is not None:
            counters.seconds_measure += time.perf_counter() - begin
            counters.flops += self.flops.measurement(controller.probe_tokens)
            self.log.measure(measurement)
        counters.cpu_seconds += time.process_time() - cpu
        if measurement and measurement.step == controller.state.began and is_main() and self.log.shows:
            self.log.say(sparse_begins(job.config, measurement, controller.state.estimates))

    def _count(self, mode: str, experts: tuple[int | None, ...], seconds: float) -> None:
        counters, sparse = self.counters, mode == "sparse"
        counters.steps += 1
        shares = active_shares(self.job)
        self.log.ways = counters.count_ways(experts, shares)
        flops = self.flops.step(experts, shares, self.job.controller.state.estimates)
        counters.flops += flops
        counters.sparse_steps += sparse
        counters.window_steps += 1
        counters.window_sparse += sparse
        counters.window_seconds += seconds
        if sparse:
            counters.seconds_sparse += seconds
            counters.flops_sparse += flops
        else:
            counters.seconds_dense += seconds
            counters.flops_dense += flops
        self.log.advance(mode, self._shown_loss, self.flops.tokens / seconds)

    def _settle(self) -> None:
        """Wait until the GPU has done the steps it was given, and count the wait as training."""
        if self.job.device.type != "cuda":
            return
        begin = time.perf_counter()
        torch.cuda.synchronize(self.job.device)
        seconds, counters = time.perf_counter() - begin, self.counters
        counters.window_seconds += seconds
        # Which mode's steps it waited for is not known: divide it by their number since the last train line.
        sparse = seconds * counters.window_sparse / max(1, counters.window_steps)
        counters.seconds_sparse += sparse
        counters.seconds_dense += seconds - sparse

    def _log_train(self) -> None:
        counters = self.counters
        loss = self._loss_so_far() / counters.window_steps
        self._check_loss("loss", loss)
        self._shown_loss = loss
        self.log.train(
            counters.steps,
            {
                "loss": loss,
                "sparse_fraction": counters.window_sparse / counters.window_steps,
                "phase": self.job.controller.phase,
                "learning_rate": self._learning_rate,
                "tokens": counters.steps * self.flops.tokens,
                "flops": counters.flops,
                "tokens_per_second": counters.window_steps * self.flops.tokens / counters.window_seconds,
                "step_ways": counters.window_ways,
            },
        )
        self._window_loss.zero_()
        counters.new_window()

    def _loss_so_far(self) -> float:
        """Return the sum of the losses since the last train line, of all ranks: the one host sync of training."""
        return sum_over_ranks([float(self._window_loss)])[0] / world_size()

    def _check_loss(self, name: str, loss: float | None) -> None:
        if loss is not None and not math.isfinite(loss):
            self._stop_diverged(f"the {name} became {loss}")

    def _check_weights(self, others: Mapping[str, Tensor] | None = None) -> None:
        """Refuse weights, and other tensors, that are not finite: the loss shows it a step later."""
        tensors = {**dict(self.job.model.named_parameters()), **(others or {})}
        found = next(filter(None, gather(lambda: not_finite(tensors))), None)
        if found is not None:
            self._stop_diverged(f"training diverged: {found}")

    def _stop_diverged(self, what: str) -> NoReturn:
        """Nothing that is not finite is measured, reported or kept; what was saved before stands."""
        last = "nothing was saved yet"
        if saved := self.rundir.steps():
            last = f"the last good checkpoint is {self.rundir.checkpoint(saved[-1])}"
        raise InputError(
            f"{what} in the {max(1, self.counters.window_steps)} steps up to step {self.counters.steps}; "
            f"stopped, {last}. Lower --learning-rate or set --grad-clip, and start again"
        )

    def evaluate(self) -> None:
        """Validate in both modes and record it, with what training had cost by then."""
        begin = time.perf_counter()
        self.validation = self.validate()
        for name, value in self.validation.items():
            self._check_loss(name, value)
        counters = self.counters
        progress = {
            "tokens": counters.steps * self.flops.tokens,
            "flops": counters.flops,
            "train_seconds": counters.train_seconds,
            "cpu_seconds": counters.cpu_seconds,
        }
        self.log.evaluation(counters.steps, self.validation, progress)
        counters.seconds_other += time.perf_counter() - begin

    def validate(self) -> dict[str, float | None]:
        """Return validation loss (nats per predicted token) and bits per byte in both modes, None for what is not.

        There is no sparse mode before sparse training has begun, and no dense one of a mixture of experts. Bits per
        byte of text follow from the loss only where every token is predicted, that is for causal models.
        """
        job, controller = self.job, self.job.controller
        modes = {"dense": controller.layers[0].has_dense_mode, "sparse": any(controller.state.takes_part)}
        shows = is_main() and self.log.shows
        with job.replica.autocast():
            losses = {
                mode: loss_in_mode(job.model, job.validation, mode, shows) if exists else None
                for mode, exists in modes.items()
            }
        return {f"val_loss_{mode}": loss for mode, loss in losses.items()} | {
            f"bits_per_byte_{mode}": self._bits_per_byte(loss) for mode, loss in losses.items()
        }

    def _bits_per_byte(self, loss: float | None) -> float | None:
        if loss is None or self.job.objective != "causal":
            return None
        val = self.job.data.val
        return bits_per_byte(loss, val.tokens, val.text_bytes)

    def _snapshot(self) -> None:
        """Keep the weights as they are now, for `switchable study`."""
        begin = time.perf_counter()
        checkpoint.write(self.rundir.snapshot(self.counters.steps), contents_of(self.job.model))
        self.counters.seconds_other += time.perf_counter() - begin

    def save(self) -> None:
        """Write a checkpoint, then drop those that are older than the `keep` newest.

        Training waits for it: whenever the run is killed, no more is lost than the steps of one interval.
        """
        begin = time.perf_counter()
        job, counters = self.job, self.counters
        self.log.sync()
        counters.window_loss = self._loss_so_far() if counters.window_steps else 0.0
        self._check_loss("loss", counters.window_loss)
        schedule, counted = job.controller.state_dict(), dataclasses.asdict(counters)
        state = training_state(job.model, job.optimizer, schedule, counted)
        self._check_weights(state[0])
        checkpoint.write(self.rundir.checkpoint(counters.steps), contents_of(job.model, state))
        if is_main():
            self.rundir.drop_old(job.config.train.keep)
        counters.seconds_other += time.perf_counter() - begin


def update(job: Job, step: int) -> Tensor:
    """Learn from the batch of step `step` (counted from 0); return its mean loss."""
    loss = job.replica.forward_backward(job.batch(step))
    clip_gradients(job.optimizer, job.config.train.grad_clip)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    return loss


def active_shares(job: Job) -> list[float | None]:
    """Return what share of each layer's activations was not zero since last asked; None where nobody counted."""
    return [layer.ssd.active_count.take(layer.ssd.d_ff) for layer in job.controller.layers]


def snapshot_steps(total_steps: int, count: int) -> set[int]:
    """Return `count` steps (fewer in a short run) after which weights are kept.

    Most changes happen early, so their distances grow like a geometric series, from a hundredth of the run on.
    """
    if not count:
        return set()
    first = max(1.0, total_steps / 100)
    ratio = (total_steps / first) ** (1 / max(1, count - 1))
    return {round(total_steps / ratio**i) for i in range(count)}
