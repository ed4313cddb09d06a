"""Batches are a pure function of (seed, index), cover the text once per epoch, and divide among ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from switchable.data.batches import Batches, bits_per_byte, validation_batches
from switchable.data.objectives import CausalLM
from switchable.errors import InputError


class CausalBatches(Batches):
    """Plain windows, as a causal model sees them: one tensor per batch."""

    def __init__(self, tokens, batch_size, sequence_length, seed, rank=0, world_size=1) -> None:  # type: ignore[no-untyped-def]
        super().__init__(tokens, CausalLM(sequence_length), batch_size, seed, rank, world_size)

    def batch(self, index: int) -> torch.Tensor:  # type: ignore[override]
        inputs = super().batch(index)
        assert torch.equal(inputs["input_ids"], inputs["labels"])
        return inputs["input_ids"]


def arange(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint16)


def write_tokens(folder: Path, tokens: np.ndarray) -> Path:
    tokens.tofile(folder / "train.bin")
    (folder / "meta.json").write_text(json.dumps({"dtype": str(tokens.dtype)}), encoding="utf-8")
    return folder / "train.bin"


def test_shape_type_and_consecutive_tokens() -> None:
    batch = CausalBatches(arange(1000), batch_size=4, sequence_length=16, seed=0).batch(3)
    assert batch.shape == (4, 16)
    assert batch.dtype == torch.int64
    assert (batch[:, 1:] - batch[:, :-1] == 1).all()


def test_each_epoch_shows_each_window_once_at_a_new_offset() -> None:
    batches = CausalBatches(arange(1003), batch_size=3, sequence_length=10, seed=1)
    windows = batches.windows_per_epoch
    assert windows == 99  # 1003 - 9 = 994 tokens are there whatever the offset
    offsets, orders = [], []
    for epoch in range(6):
        starts = torch.cat([batches.batch(i)[:, 0] for i in range(epoch * 33, (epoch + 1) * 33)])
        offset = int(starts.min())
        assert 0 <= offset < 10
        assert sorted(starts.tolist()) == [offset + 10 * w for w in range(99)]
        offsets.append(offset)
        orders.append(((starts - offset) // 10).tolist())
    assert len(set(offsets)) > 1
    assert len(set(map(tuple, orders))) == 6


def test_batches_go_on_across_the_end_of_an_epoch() -> None:
    batches = CausalBatches(arange(57), batch_size=3, sequence_length=10, seed=4)  # 4 windows in an epoch
    assert batches.windows_per_epoch == 4
    rows = torch.cat([batches.batch(i) for i in range(4)])  # 12 rows: exactly 3 epochs
    for epoch in range(3):
        starts = rows[4 * epoch : 4 * epoch + 4, 0]
        assert len(set((starts // 10).tolist())) == 4


def test_pure_function_of_seed_and_index() -> None:
    def make(seed: int) -> CausalBatches:
        return CausalBatches(arange(5000), batch_size=4, sequence_length=8, seed=seed)

    forward = [make(0).batch(i) for i in range(0, 400, 37)]
    one = make(0)
    for i, expected in reversed(list(zip(range(0, 400, 37), forward, strict=True))):  # any order, any object
        assert torch.equal(one.batch(i), expected)
    assert not torch.equal(make(1).batch(0), make(0).batch(0))


def test_order_is_frozen() -> None:
    """A run must resume on the same text after an upgrade of NumPy or of this package."""
    batches = CausalBatches(arange(100), batch_size=4, sequence_length=10, seed=7)
    assert [batches.batch(i)[:, 0].tolist() for i in (0, 1, 5)] == FROZEN


FROZEN = [[53, 23, 33, 83], [13, 73, 63, 43], [38, 48, 68, 8]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_part_the_batch_in_strides(world_size: int) -> None:
    whole = CausalBatches(arange(333), batch_size=8, sequence_length=10, seed=2)
    parts = [CausalBatches(arange(333), 8, 10, 2, rank, world_size) for rank in range(world_size)]
    for index in (0, 3, 4, 11):  # 32 windows in an epoch; 3 and 4 meet at its end
        local = [part.batch(index) for part in parts]
        assert all(rows.shape == (8 // world_size, 10) for rows in local)
        assert torch.equal(torch.stack(local, 1).flatten(0, 1), whole.batch(index))
        assert torch.equal(local[0], whole.batch(index)[::world_size])


def test_token_file_is_mapped_not_read(tmp_path: Path) -> None:
    path = write_tokens(tmp_path, np.arange(70_000, dtype=np.uint32))
    batches = CausalBatches(path, batch_size=2, sequence_length=8, seed=0)
    assert isinstance(batches.tokens.base, np.memmap)
    assert batches.tokens.dtype == np.uint32
    assert torch.equal(batches.batch(5), CausalBatches(np.arange(70_000), 2, 8, 0).batch(5))


def test_token_file_without_meta(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train.bin: not a token file with its meta.json"):
        CausalBatches(tmp_path / "train.bin", 2, 8, 0)


@pytest.mark.parametrize(("tokens", "windows"), [(40, 4), (41, 4), (49, 4), (58, 4), (59, 5)])
def test_smallest_corpus(tokens: int, windows: int) -> None:
    batches = CausalBatches(arange(tokens), batch_size=4, sequence_length=10, seed=0)
    assert batches.windows_per_epoch == windows
    for i in range(20):
        assert int(batches.batch(i).max()) < tokens


def test_too_short_for_one_batch() -> None:
    with pytest.raises(InputError, match="39 tokens, but 4 sequences of 10 are 40; give more text"):
        CausalBatches(arange(39), batch_size=4, sequence_length=10, seed=0)


def test_wrong_arguments() -> None:
    with pytest.raises(
        InputError, match=r"batch_size=6 does not divide among 4 processes; use a multiple of 4, e.g. 8"
    ):
        CausalBatches(arange(100), 6, 2, 0, rank=0, world_size=4)
    with pytest.raises(InputError, match="must be 1 or more"):
        CausalBatches(arange(100), 0, 2, 0)
    with pytest.raises(ValueError, match="rank=4"):
        CausalBatches(arange(100), 8, 2, 0, rank=4, world_size=4)
    with pytest.raises(ValueError, match="below 0"):
        CausalBatches(arange(100), 8, 2, 0).batch(-1)


# --- validation ---


def windows_of(
    tokens: np.ndarray, batch_size: int, sequence_length: int, eval_tokens: int, rank: int = 0, world: int = 1
) -> list[torch.Tensor]:
    found = validation_batches(tokens, CausalLM(sequence_length), batch_size, eval_tokens, rank, world)
    return [batch["input_ids"] for batch in found]


def test_validation_goes_through_the_text_in_order() -> None:
    batches = windows_of(arange(100), batch_size=2, sequence_length=10, eval_tokens=75)
    assert [b[:, 0].tolist() for b in batches] == [
        [0, 10],
        [20, 30],
        [40, 50],
    ]  # the 7th window fills no batch
    assert batches[0].dtype == torch.int64
    assert batches[0][1].tolist() == list(range(10, 20))


def test_validation_batches_of_less_than_a_batch() -> None:
    batches = windows_of(arange(35), batch_size=8, sequence_length=10, eval_tokens=10_000)
    assert [b[:, 0].tolist() for b in batches] == [[0, 10, 20]]
    with pytest.raises(InputError, match="nothing to evaluate: 9 validation tokens"):
        windows_of(arange(9), 8, 10, 10_000)
    with pytest.raises(InputError, match="eval_tokens=9"):
        windows_of(arange(90), 8, 10, 9)


def test_validation_ranks_have_equal_shapes() -> None:
    parts = [windows_of(arange(35), 8, 10, 10_000, rank, 2) for rank in range(2)]
    assert [[b[:, 0].tolist() for b in part] for part in parts] == [[[0]], [[10]]]
    parts = [windows_of(arange(100), 4, 10, 80, rank, 2) for rank in range(2)]
    assert [[b[:, 0].tolist() for b in part] for part in parts] == [[[0, 20], [40, 60]], [[10, 30], [50, 70]]]


# --- bits per byte ---


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(2), tokens=8, bytes=8) == pytest.approx(1.0)
    # 3 nats per token are 4.32809 bits; 250 tokens of 1000 bytes: a quarter of that per byte.
    assert bits_per_byte(3.0, tokens=250, bytes=1000) == pytest.approx(1.0820213, abs=1e-7)
    assert bits_per_byte(math.log(256), tokens=5, bytes=5) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="above 0"):
        bits_per_byte(1.0, 5, 0)
