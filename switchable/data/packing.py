"""Files as bytes, unpacked: gzip, bzip2, xz and Zstandard, told by the name or by the first bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from switchable.errors import InputError

CHUNK_BYTES = 1 << 20
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


def _zstd(file: IO[bytes]) -> Any:
    return io.BufferedReader(pa.CompressedInputStream(file, "zstd"), CHUNK_BYTES)


PACKINGS: dict[str, tuple[bytes, Callable[[Any], Any]]] = {
    ".gz": (rb"\x1f\x8b\x08", gzip.open),
    ".bz2": (rb"BZh[1-9]1AY&SY", bz2.open),
    ".xz": (rb"\xfd7zXZ\x00", lzma.open),
    ".zst": (rb"\x28\xb5\x2f\xfd", _zstd),
}
"""By suffix: how a packed file begins, and what unpacks it."""


def packing_of(path: Path) -> str:
    """Return the suffix of a file's packing, empty if it is not packed; InputError if it cannot be read."""
    if path.suffix in PACKINGS:
        return path.suffix
    with opened(path) as file:
        head = file.read(16)
    return next((suffix for suffix, (magic, _) in PACKINGS.items() if re.match(magic, head)), "")


@contextmanager
def opened(path: Path, packing: str = "") -> Iterator[Any]:
    """Open a file, unpacked, for the `with` block; whatever shows there that it is damaged becomes an InputError."""
    try:
        with path.open("rb") as file:
            if not packing:
                yield file
                return
            with PACKINGS[packing][1](file) as unpacked:
                yield unpacked
    except DAMAGE as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> InputError:
    """Return the error to raise for a file that cannot be read."""
    if isinstance(error, OSError) and error.errno is not None:
        return InputError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions")
    return InputError(f"{path}: truncated, damaged or not what its suffix says ({error}); fetch it again")
