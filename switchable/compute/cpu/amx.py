"""AMX's instructions in LLVM's language: eight *tiles* of 16 rows of 64 bytes, and a product of two of them.

    total[m, n] += Σ_k left[m, 2k] · right[k, 2n] + left[m, 2k + 1] · right[k, 2n + 1]

The factors are bfloat16 in pairs, 32 bits each; sums are float32. A thread must configure its tiles before it uses
them, and releases them when it has done: others may use the thread afterwards.

Source: Intel's manual (LDTILECFG, TILELOADD, TDPBF16PS, TILESTORED); LLVM's intrinsics of the same names.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

ROWS = 16
"""Of a tile; also float32s, or pairs of bfloat16, in a row."""
TILES = 8
CONFIGURATION = bytes(
    [1, *[0] * 15]  # palette 1
    + [64, 0] * TILES  # bytes of a row, two bytes for each of 16 tiles
    + [0] * 16
    + [ROWS] * TILES
    + [0] * 8
)
"""What LDTILECFG reads: all tiles have their full size."""
_I8, _I64, _ADDRESS = ir.IntType(8), ir.IntType(64), ir.PointerType()


@dataclass(frozen=True)
class AMX:
    """Appends the instructions to a function; tiles are numbered from 0, a `stride` is in bytes."""

    def configure(self, b: ir.IRBuilder) -> None:
        """Give the thread its tiles, which are zero."""
        kind, name = ir.ArrayType(_I8, len(CONFIGURATION)), "amx_configuration"
        if (memory := b.module.globals.get(name)) is None:
            memory = ir.GlobalVariable(b.module, kind, name)
            memory.initializer = ir.Constant(kind, bytearray(CONFIGURATION))
            memory.global_constant, memory.linkage = True, "internal"
        _call(b, "ldtilecfg", b.bitcast(memory, _ADDRESS))

    def release(self, b: ir.IRBuilder) -> None:
        """Give the tiles back."""
        _call(b, "tilerelease")

    def zero(self, b: ir.IRBuilder, tile: int) -> None:
        """Set a tile to zero."""
        _call(b, "tilezero", _I8(tile))

    def load(self, b: ir.IRBuilder, tile: int, address: ir.Value, stride: int) -> None:
        """Read a tile."""
        _call(b, "tileloadd64", _I8(tile), address, _I64(stride))

    def store(self, b: ir.IRBuilder, tile: int, address: ir.Value, stride: int) -> None:
        """Write a tile."""
        _call(b, "tilestored64", _I8(tile), address, _I64(stride))

    def multiply_add(self, b: ir.IRBuilder, total: int, left: int, right: int) -> None:
        """Add the product of two tiles to a third."""
        _call(b, "tdpbf16ps", _I8(total), _I8(left), _I8(right))


def _call(b: ir.IRBuilder, name: str, *operands: ir.Value) -> None:
    kinds = [_ADDRESS if isinstance(operand.type, ir.PointerType) else operand.type for operand in operands]
    function = b.module.declare_intrinsic(f"llvm.x86.{name}", fnty=ir.FunctionType(ir.VoidType(), kinds))
    b.call(function, operands)
