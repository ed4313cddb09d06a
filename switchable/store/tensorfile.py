"""A safetensors file that several processes write together, each its own rows, and read back in any other division.

    8 bytes: length N of the header | N bytes: JSON, name -> dtype, shape, [begin, end) | the tensors, row by row

Rows of dimension 0 are a range of bytes, so a tensor of which each rank holds some rows (FSDP2) is written in place by
all of them at once, without gathering anything. The result is an ordinary safetensors file that says nothing about
who wrote it: one format for one process and for a thousand, and any of them can resume from it. (torch's own
distributed checkpoints keep their index in a pickle, and need a conversion before anything else can read them.)

Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from switchable.errors import InputError
from switchable.ranks import is_main, is_sharded, rows_here

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

METADATA = {"format": "pt"}
"""What transformers wants to see in the header of a safetensors file."""


@dataclass(frozen=True)
class Piece:
    """The rows of a tensor that this rank writes."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    data: Tensor | None
    """A copy of the rows on the CPU, contiguous; None: another rank writes them."""
    first_row: int = 0

    @property
    def bytes(self) -> int:
        """Size of the whole tensor in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def offset(self) -> int:
        """Bytes of the tensor before this piece."""
        return self.first_row * math.prod(self.shape[1:]) * self.dtype.itemsize


def copy_piece(tensor: Tensor) -> Piece:
    """Copy to the CPU what this rank has to write of a tensor: its rows of a sharded one; of others, rank 0 all."""
    rows, first = rows_here(tensor.detach())
    data = None
    if is_main() or is_sharded(tensor):
        # One copy, row by row whatever the strides of the tensor.
        data = torch.empty(rows.shape, dtype=rows.dtype).copy_(rows)
    return Piece(tuple(tensor.shape), tensor.dtype, data, first)


def _layout(pieces: Mapping[str, Piece]) -> tuple[bytes, dict[str, int]]:
    """Return the start of the file and where in the file each tensor begins."""
    # Widest types first keep every tensor aligned to its type.
    names = sorted(pieces, key=lambda name: (-pieces[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": METADATA}
    begins, end = {}, 0
    for name in names:
        piece = pieces[name]
        begins[name], end = end, end + piece.bytes
        place = {"shape": list(piece.shape), "data_offsets": [begins[name], end]}
        header[name] = {"dtype": NAMES[piece.dtype], **place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return start, {name: len(start) + begin for name, begin in begins.items()}


def create(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write the header and give the file its full size (one process does this, before any writes its rows)."""
    start, _ = _layout(pieces)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + sum(piece.bytes for piece in pieces.values()))


def write(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write this rank's rows into a created file and flush them to disk; raise OSError if, say, that is full."""
    _, begins = _layout(pieces)
    with path.open("r+b") as file:
        for name, piece in pieces.items():
            if piece.data is not None and piece.data.numel():
                rows = piece.data.reshape(-1).view(torch.uint8).numpy().data
                position = begins[name] + piece.offset
                while rows:
                    done = os.pwrite(file.fileno(), rows, position)
                    rows, position = rows[done:], position + done
        os.fsync(file.fileno())


class TensorFile:
    """A safetensors file, mapped into memory and read row by row; InputError if there is none or it is damaged."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = cast(Any, safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} is missing or damaged ({error}); give the folder of a whole model"
            ) from None
        self.names: set[str] = set(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in the file."""
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor, in memory of its own."""
        return self.mapped(name).clone()

    def mapped(self, name: str) -> Tensor:
        """Return a whole tensor, for reading: its memory is the file's, which stays open as long as one is held."""
        return cast(Tensor, self._file.get_tensor(name))

    @torch.no_grad()
    def read_into(self, name: str, target: Tensor) -> None:
        """Copy a tensor of the same shape into `target`, of a sharded one this rank's rows alone."""
        rows, first = rows_here(target)
        if rows.ndim == 0:
            rows.copy_(self._file.get_tensor(name))
        elif rows.shape[0]:
            rows.copy_(self._file.get_slice(name)[first : first + rows.shape[0]])


def fill(model: nn.Module, tensors: Mapping[str, tuple[Path, str]]) -> None:
    """Give a model parameters by their names, each a tensor of a file, which is opened anew for it.

    Pages that were read count as the process's until their file is closed.
    """
    for name, (path, full) in tensors.items():
        module, _, leaf = name.rpartition(".")
        tensor = TensorFile(path).tensor(full)
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
