"""Token file -> the batch of a given index: `Batches(tokens, objective, ...).batch(index)`.

A batch is a pure function of (seed, index): a run resumes from the one integer it has reached. How an index becomes
windows of the file:

    epoch e, window w:  tokens[offset_e + S · w : offset_e + S · (w + 1)],   w = order_e[position]

with a fresh random offset (below S) and a fresh random order per epoch, both from the raw output of PCG64, which NumPy
promises not to change. The windows of all epochs stand in one endless row; batch i is the B windows from i · B on. So
every epoch shows each window once, and a batch may hold the end of one epoch and the start of the next.

The objective makes model inputs of windows (`objectives/`), from the number of each in that endless row.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from switchable.arrays import Ints
from switchable.data.objectives import Objective
from switchable.errors import InputError
from switchable.files import read_json

VALIDATION_SEED = 0  # of what is masked in validation batches

TokenSource = npt.NDArray[np.integer[Any]] | str | os.PathLike[str]


class Batches:
    """Batches to train on: index -> model inputs, each LongTensor [B_local, ...].

    Args:
        tokens: flat array of token ids [tokens], or the path of a token file that `tokens.prepare` made.
        objective: what to make of a window, and how many tokens that has (S).
        batch_size: windows in a batch, all ranks together (B).
        seed: of the order and the offsets.
        rank: which part of each batch to return: the rows rank, rank + world_size, rank + 2 · world_size, ...
        world_size: number of parts; the parts are disjoint and make up the batch of one process,
            `stack(parts, 1).flatten(0, 1)`.

    Raises:
        InputError: fewer tokens than one batch, or a batch that does not divide among the ranks.
    """

    def __init__(
        self, tokens: TokenSource, objective: Objective, batch_size: int, seed: int, rank: int = 0,
        world_size: int = 1,
    ) -> None:  # fmt: skip
        self.tokens, self.objective = token_array(tokens), objective
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        _check_batch(batch_size, objective.window, rank, world_size)
        needed = batch_size * objective.window
        if len(self.tokens) < needed:
            raise InputError(
                f"the training text is shorter than one batch: {len(self.tokens):,} tokens, but {batch_size} "
                f"sequences of {objective.window} are {needed:,}; give more text, or make batches smaller"
            )
        # One window is given up so that any offset below S fits, unless the batch needs all there are.
        self.windows_per_epoch = max(batch_size, (len(self.tokens) + 1) // objective.window - 1)
        """Windows in an epoch (W), the same for every epoch."""
        self._epochs: dict[int, Ints] = {}

    def batch(self, index: int) -> dict[str, Tensor]:
        """Return this rank's part of batch `index` (0, 1, 2, ...)."""
        if index < 0:
            raise ValueError(f"batch index {index} is below 0")
        first = index * self.batch_size
        rows = np.arange(first + self.rank, first + self.batch_size, self.world_size, dtype=np.int64)
        starts = [self._start(*divmod(int(row), self.windows_per_epoch)) for row in rows]
        windows = np.stack([self.tokens[start : start + self.objective.window] for start in starts])
        return _tensors(self.objective(windows.astype(np.int64), rows, self.seed))

    def _start(self, epoch: int, position: int) -> int:
        if epoch not in self._epochs:
            # A batch reaches into two epochs at most, so no more need be kept.
            self._epochs = {e: starts for e, starts in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = self._starts(epoch)
        return int(self._epochs[epoch][position])

    def _starts(self, epoch: int) -> Ints:
        """Where the windows of an epoch start, in the epoch's order: [W]."""
        length, count = self.objective.window, self.windows_per_epoch
        raw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(count + 1)
        offset = int(raw[0]) % min(length, len(self.tokens) - count * length + 1)
        return np.argsort(raw[1:], kind="stable") * length + offset


def validation_batches(
    tokens: TokenSource, objective: Objective, batch_size: int, eval_tokens: int, rank: int = 0, world_size: int = 1,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Return the batches to validate on, always the same: windows side by side from the start of the file.

    Every rank gets the same number of batches of the same shape; a last batch that would be smaller is left out, unless
    it is the only one. At most `eval_tokens` tokens are used; the rest is as for `Batches`. Raises InputError if there
    is not even one window per rank.
    """
    array, length = token_array(tokens), objective.window
    _check_batch(batch_size, length, rank, world_size)
    if (count := min(len(array), eval_tokens) // length) < world_size:
        raise InputError(
            f"nothing to evaluate: {len(array):,} validation tokens and eval_tokens={eval_tokens:,} hold "
            f"{count} windows of {length} tokens, for {world_size} process(es); give more text, a "
            "larger val_fraction or eval_tokens, or a shorter sequence"
        )
    size = min(batch_size, count // world_size * world_size)
    windows = array[: count * length].reshape(count, length)
    starts = range(0, count - size + 1, size)
    parts = [np.arange(start + rank, start + size, world_size, dtype=np.int64) for start in starts]
    return [_tensors(objective(windows[rows].astype(np.int64), rows, VALIDATION_SEED)) for rows in parts]


def _tensors(arrays: dict[str, Ints]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def bits_per_byte(loss_nats_per_token: float, tokens: int, bytes: int) -> float:
    """Return a loss (nats per token, ends of text included) in bits per UTF-8 byte, whatever the tokenizer.

    loss / ln 2 · tokens / bytes. Only the ratio of tokens and bytes counts: those of the whole validation split will do
    where some of it was evaluated (`Split.tokens`, `Split.text_bytes`). Raises ValueError if there are none.
    """
    if tokens <= 0 or bytes <= 0:
        raise ValueError(f"bits per byte needs tokens and bytes above 0, not {tokens} and {bytes}")
    return loss_nats_per_token / math.log(2) * tokens / bytes


def token_array(tokens: TokenSource) -> npt.NDArray[np.integer[Any]]:
    """Return the token ids of a file that `tokens.prepare` made, mapped into memory, or the array itself.

    Raises InputError for anything else than such a file.
    """
    if isinstance(tokens, np.ndarray):
        return tokens.view(np.ndarray)  # slices of np.memmap are slow, of a plain view of it fast
    path = Path(tokens)
    try:
        dtype = read_json(path.with_name("meta.json"))["dtype"]
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: not a token file with its meta.json beside it ({error}); prepare the data again"
        ) from error


def _check_batch(batch_size: int, sequence_length: int, rank: int, world_size: int) -> None:
    if batch_size < 1 or sequence_length < 1:
        raise InputError(f"batch_size={batch_size} and sequence_length={sequence_length} must be 1 or more")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not one of the {world_size} ranks 0 to {world_size - 1}")
    if batch_size % world_size:
        raise InputError(
            f"batch_size={batch_size} does not divide among {world_size} processes; "
            f"use a multiple of {world_size}, e.g. {math.ceil(batch_size / world_size) * world_size}"
        )
