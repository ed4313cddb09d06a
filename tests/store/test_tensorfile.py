"""Files that several ranks write together: what safetensors itself reads in them, whoever wrote which rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from switchable.store import tensorfile
from switchable.store.tensorfile import METADATA, NAMES, Piece, TensorFile, copy_piece


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {str(dtype): torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in NAMES}
    return found | {
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 4),
        "columns first": torch.randn(4, 6, generator=generator).T,
    }


def test_one_writer_makes_what_safetensors_reads(tmp_path: Path) -> None:
    given = tensors()
    pieces = {name: copy_piece(tensor) for name, tensor in given.items()}
    tensorfile.create(tmp_path / "a", pieces)
    tensorfile.write(tmp_path / "a", pieces)
    found = load_file(tmp_path / "a")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    plain = {name: tensor.contiguous() for name, tensor in given.items()}
    save_file(plain, tmp_path / "b", METADATA)
    assert (tmp_path / "a").stat().st_size == (tmp_path / "b").stat().st_size


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_writers_of_some_rows_each_make_the_same_file(tmp_path: Path, ranks: int) -> None:
    whole = torch.arange(55.0).view(5, 11)
    rows = -(-5 // ranks)
    parts = [
        {"t": Piece((5, 11), whole.dtype, whole[r * rows : (r + 1) * rows].clone(), min(r * rows, 5))}
        for r in range(ranks)
    ]
    tensorfile.create(tmp_path / "t", parts[0])
    for part in reversed(parts):
        tensorfile.write(tmp_path / "t", part)
    assert torch.equal(load_file(tmp_path / "t")["t"], whole)


def test_a_copy_does_not_follow_its_tensor(tmp_path: Path) -> None:
    tensor = torch.ones(3, 4)
    pieces = {"t": copy_piece(tensor)}
    tensor.zero_()
    tensorfile.create(tmp_path / "t", pieces)
    tensorfile.write(tmp_path / "t", pieces)
    file = TensorFile(tmp_path / "t")
    assert file.shape("t") == (3, 4)
    file.read_into("t", tensor)
    assert torch.equal(tensor, torch.ones(3, 4))
    columns = torch.zeros(4, 3).T
    file.read_into("t", columns)
    assert torch.equal(columns, tensor)
    assert columns.stride() == (1, 3)
