"""AMX's tiles in plain code, as Intel's manual defines them, for processors that have none.

Every thread has tiles of its own, in memory that it finds through a key of the C library. What the processor would
refuse, tiles that are used but not configured, or configured twice, is counted instead.
"""

from __future__ import annotations

import ctypes

import pytest
from llvmlite import ir

from switchable.compute.cpu.amx import ROWS, TILES
from switchable.compute.cpu.experts import packing
from switchable.compute.cpu.llvm import I32, I64, POINTER, Writer

ROW_BYTES = 64
TILE_BYTES = ROWS * ROW_BYTES
STATE_BYTES = 8 + TILES * TILE_BYTES  # whether they are configured, and the tiles
SMALLEST = 2.0**-126  # smaller ones are taken for 0
WORDS, FLOATS = ir.VectorType(I32, ROWS), ir.VectorType(ir.FloatType(), ROWS)


def always_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let AMX multiply what is too small to be worth it, too."""
    monkeypatch.setattr(packing, "FEWEST_IN_TILES", 0)
    monkeypatch.setattr(packing, "SMALLEST_IN_TILES", 0)


class EmulatedAMX:
    """Writes calls of functions that do what the instructions of `AMX` do."""

    def __init__(self) -> None:
        key = ctypes.c_uint()
        ctypes.CDLL(None).pthread_key_create(ctypes.byref(key), None)
        self.key = key.value
        self.counts = (ctypes.c_int64 * 2)()

    @property
    def faults(self) -> int:
        """What the processor would have refused."""
        return self.counts[0]

    @property
    def products(self) -> int:
        """Of two tiles, made so far."""
        return self.counts[1]

    def configure(self, b: ir.IRBuilder) -> None:
        state = self._state(b, configured=False)
        b.store(I64(1), state)
        for tile in range(TILES):
            _zero(b, _tile(b, state, tile))

    def release(self, b: ir.IRBuilder) -> None:
        b.store(I64(0), self._state(b))

    def zero(self, b: ir.IRBuilder, tile: int) -> None:
        _zero(b, _tile(b, self._state(b), tile))

    def load(self, b: ir.IRBuilder, tile: int, address: ir.Value, stride: int) -> None:
        _copy(b, address, stride, _tile(b, self._state(b), tile), ROW_BYTES)

    def store(self, b: ir.IRBuilder, tile: int, address: ir.Value, stride: int) -> None:
        _copy(b, _tile(b, self._state(b), tile), ROW_BYTES, address, stride)

    def multiply_add(self, b: ir.IRBuilder, total: int, left: int, right: int) -> None:
        state = self._state(b)
        self._count(b, 1, I64(1))
        b.call(_product(b.module), [_tile(b, state, tile) for tile in (total, left, right)])

    def _state(self, b: ir.IRBuilder, configured: bool = True) -> ir.Value:
        """This thread's memory; a fault unless its tiles are configured, or are not."""
        state = b.call(_state(b.module, self.key), [])
        self._count(b, 0, b.zext(b.icmp_unsigned("!=", b.load(state, typ=I64), I64(int(configured))), I64))
        return state

    def _count(self, b: ir.IRBuilder, which: int, amount: ir.Value) -> None:
        address = I64(ctypes.addressof(self.counts) + 8 * which)
        b.atomic_rmw("add", b.inttoptr(address, POINTER), amount, "monotonic")


def _state(module: ir.Module, key: int) -> ir.Function:
    """The function that returns the calling thread's memory, which is zero at first."""
    found = module.globals.get("amx_state")
    if found is not None:
        return found
    find = ir.Function(module, ir.FunctionType(POINTER, [I32]), "pthread_getspecific")
    keep = ir.Function(module, ir.FunctionType(I32, [I32, POINTER]), "pthread_setspecific")
    new = ir.Function(module, ir.FunctionType(POINTER, [I64, I64]), "calloc")
    function = ir.Function(module, ir.FunctionType(POINTER, []), "amx_state")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    state = b.call(find, [I32(key)])
    with b.if_then(b.icmp_unsigned("==", b.ptrtoint(state, I64), I64(0))):
        memory = b.call(new, [I64(1), I64(STATE_BYTES)])
        b.call(keep, [I32(key), memory])
    b.ret(b.call(find, [I32(key)]))
    return function


def _tile(b: ir.IRBuilder, state: ir.Value, tile: int) -> ir.Value:
    return b.gep(state, [I64(8 + tile * TILE_BYTES)], source_etype=ir.IntType(8))


def _zero(b: ir.IRBuilder, tile: ir.Value) -> None:
    for row in range(ROWS):
        b.store(ir.Constant(WORDS, None), _row(b, tile, I64(row * ROW_BYTES)), align=2)


def _row(b: ir.IRBuilder, address: ir.Value, place: ir.Value) -> ir.Value:
    return b.gep(address, [place], source_etype=ir.IntType(8))


def _copy(b: ir.IRBuilder, source: ir.Value, apart: int, target: ir.Value, stride: int) -> None:
    """Call the function that copies 16 rows at one distance to another."""
    function = b.module.globals.get("amx_copy")
    if function is None:
        w = Writer(b.module, "amx_copy", [POINTER, I64, POINTER, I64], wide=False, lanes=ROWS)
        first, step, place, other = w.arguments

        def row(r: ir.Value) -> None:
            words = w.b.load(_row(w.b, first, w.mul(r, step)), align=2, typ=WORDS)
            w.b.store(words, _row(w.b, place, w.mul(r, other)), align=2)

        w.each(ROWS, row)
        w.b.ret_void()
        function = w.function
        function.attributes.add("noinline")
    b.call(function, [source, I64(apart), target, I64(stride)])


def _product(module: ir.Module) -> ir.Function:
    """The function of three tiles: sums of even and of odd products, each begun from 0, are added to the total."""
    found = module.globals.get("amx_product")
    if found is not None:
        return found
    w = Writer(module, "amx_product", [POINTER] * 3, wide=False, lanes=ROWS)
    b, (total, left, right) = w.b, w.arguments
    smallest = ir.Constant(FLOATS, [ir.Constant(ir.FloatType(), SMALLEST)] * ROWS)

    def flushed(values: ir.Value) -> ir.Value:
        magnitude = w.call(f"llvm.fabs.v{ROWS}f32", FLOATS, values)
        return b.select(b.fcmp_ordered("<", magnitude, smallest), w.zero(), values)

    def halves(words: ir.Value) -> list[ir.Value]:
        """The even and the odd numbers of a row, a bfloat16 being the upper half of a float32."""
        shift, mask = (ir.Constant(WORDS, [I32(value)] * ROWS) for value in (16, 0xFFFF0000))
        return [flushed(b.bitcast(kind, FLOATS)) for kind in (b.shl(words, shift), b.and_(words, mask))]

    def row(m: ir.Value) -> None:
        def step(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            word = b.load(w.at(left, w.add(w.mul(m, ROWS), k)), typ=ir.VectorType(I32, 1), align=4)
            one, other = (
                halves(w.shuffle(word, [0] * ROWS)),
                halves(w.load(w.at(right, w.mul(k, ROWS)), WORDS)),
            )
            return [flushed(w.fma(*terms)) for terms in zip(one, other, sums, strict=True)]

        _, (even, odd) = w.loop(0, ROWS, 1, [w.zero(), w.zero()], step)
        place = w.at(total, w.mul(m, ROWS))
        w.store(flushed(b.fadd(flushed(w.load(place)), flushed(b.fadd(even, odd)))), place)

    w.each(ROWS, row)
    b.ret_void()
    w.function.attributes.add("noinline")
    return w.function


EMULATED = EmulatedAMX()
