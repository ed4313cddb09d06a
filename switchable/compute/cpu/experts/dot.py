"""`dot`: the products of each token with its experts' neurons, z_p = epilogue(Wₑ · x_t), tile by tile.

An expert's weights are put in the order in which they are read (`reorder.py`), by each chunk for itself, or by a first
stage for many chunks. Then a tile of tokens meets an expert's vectors of neurons, while the next expert's weights, and
the next tile's rows and results, are prefetched.

Shapes as in `kernels.py`.
"""

from __future__ import annotations

import itertools
from functools import partial

from llvmlite import ir

from switchable.compute.cpu.experts.amx_products import dot_by_amx
from switchable.compute.cpu.experts.kernels import PAIRS, Loops, Pace
from switchable.compute.cpu.experts.reorder import write_reorder
from switchable.compute.cpu.experts.sort import segment
from switchable.compute.cpu.llvm import I32, I64, POINTER, Index, Values, Writer
from switchable.compute.cpu.tasks import Record, Stage, Tasks

DOT = Tasks(("experts",), (*PAIRS, "x", "weights", "packed", "z", "bias", "act", "up", "dup"), stages=2)
"""Tasks are experts, whose `weights` are reordered into `packed` (no tasks if each chunk does so for itself, in a place
of its own), and then chunks; `z` and `dup` [P, I] are written, `bias` is [F], `act` and `up` [P, I]."""
BY_CHUNK = "_by_chunk"
MOST_VECTORS = 3
"""Vectors of neurons in a tile."""
MOST_WRITTEN_OUT = 4
"""Tiles of an expert that are written one after another; more are a loop, as each takes 0.1 s to compile."""


def write_dot(loops: Loops, name: str) -> None:
    """Write a function whose name says what is done to its results while they are in registers.

    "dot_relu", "dot_bias_relu": ReLU; add a bias, then ReLU. "dot", "dot_bias" (of a gated FFN's `up`): nothing; add a
    bias. "dot_mask": set to zero where the activation is not positive (ReLU's derivative); "dot_slope": times twice the
    activation (the derivative of its square). "dot_gated_mask", "dot_gated_slope": the same, but products are first
    multiplied with the activation and written to `dup`, and with `up` before they go on. With `BY_CHUNK` after it each
    chunk reorders weights.
    """
    w = loops.writer(name)
    pack, chunk = dot_stages(loops, w, name)
    DOT.write(w, pack, loops.task(w, chunk))


def dot_stages(loops: Loops, w: Writer, name: str) -> tuple[Stage, Stage]:
    """Return what a task of each stage does, of a function or of a part of one.

    A part's name may also have "square", of what ReLU gave, and "times", with what stands in `act`.
    """
    once, packing = not name.endswith(BY_CHUNK), loops.packing
    if (reorder := loops.module.globals.get("reorder_expert")) is None:
        own_writer = loops.writer("reorder_expert", [POINTER, POINTER])
        write_reorder(own_writer, packing)
        reorder = own_writer.function
    product = loops.writer(f"{name}_expert", [I64, *[POINTER] * 9])
    if loops.amx:
        dot_by_amx(loops, product, partial(_finish, loops, product, name))
    else:
        in_loop, others = _split(packing.vectors, MOST_VECTORS)
        whole = partial(_product, loops, product, name, vectors=MOST_VECTORS)
        if in_loop:
            product.range(0, in_loop, MOST_VECTORS, whole)
        for first, vectors in others:
            _product(loops, product, name, first, vectors)
    product.b.ret_void()
    own = packing.vectors * packing.steps * loops.L

    def weights(record: Record, e: Index) -> ir.Value:
        return w.at(record["weights"], w.mul(e, loops.I * loops.words_D))

    def packed(record: Record, place: ir.Value) -> ir.Value:
        return w.at(record["packed"], w.mul(place, own))

    def pack(record: Record, e: ir.Value) -> None:
        if once:
            w.b.call(reorder, [weights(record, e), packed(record, e)])

    def chunk(record: Record, number: ir.Value) -> None:
        def expert(e: ir.Value) -> None:
            first, count = segment(w, record, number, e)
            pair, following = w.mul(first, loops.I), w.add(e, 1)
            ours = packed(record, e if once else number)
            if not once:
                w.b.call(reorder, [weights(record, e), ours])
            arguments = [
                count,
                w.at(record["tokens"], first, I32),
                record["x"],
                ours,
                (packed if once else weights)(record, following),
                w.at(record["bias"], w.mul(e, loops.I)),
                *(loops.at_z(w, record[name], pair) for name in ("z", "act", "up", "dup")),
            ]
            w.b.call(product.function, arguments)

        w.each(record["experts"], expert)

    return pack, chunk


def _product(loops: Loops, w: Writer, name: str, first: Index, vectors: int) -> None:
    """Products of an expert's tokens with some of its vectors of neurons."""
    count, tokens, x, packed, following, _, z = w.arguments[:7]
    packing, p, lanes = loops.packing, loops.packing.inputs_per_vector, loops.L
    steps = packing.steps
    # An addition waits for the one before it to the same sum. One vector per token leaves too few sums to keep the
    # multipliers busy meanwhile: take two steps at a time, each with sums of its own.
    chains = 2 if vectors == 1 and steps % 2 == 0 else 1
    ours = w.at(packed, w.mul(first, steps * lanes))
    following = w.at(following, w.mul(first, steps * lanes))
    # `count` tokens of `steps` steps each prefetch steps · vectors · lanes numbers: the next expert's.
    pace = Pace(w, vectors * lanes, count)

    def tile(i: ir.Value, rows: int) -> None:
        addresses = [loops.row(w, x, tokens, i, r, words=loops.words_D) for r in range(rows)]
        for r in range(rows):
            w.prefetch(loops.row(w, x, tokens, i, rows + r, words=loops.words_D), 1, near=False)
            w.prefetch(
                _place(loops, w, z, w.add(i, rows + r), w.mul(first, packing.neurons_per_vector)), vectors
            )

        def step(d: ir.Value, carried: Values) -> Values:
            sums = list(carried)
            done = w.add(w.mul(i, steps), w.mul(d, rows))
            w.prefetch(w.at(following, pace(done)), 1, near=False)
            for chain in range(chains):
                at = w.add(d, chain)
                place = w.mul(at, lanes)
                columns = [w.load(w.at(ours, w.add(place, v * steps * lanes))) for v in range(vectors)]
                for r, address in enumerate(addresses):
                    numbers = w.load_broadcast(w.at(address, w.mul(at, p)), p)
                    for v, column in enumerate(columns):
                        which = (chain * rows + r) * vectors + v
                        sums[which] = loops.multiply_add(w, numbers, column, sums[which])
            return sums

        zeros = [w.zero()] * (chains * rows * vectors)
        _, sums = w.loop(0, steps, chains, zeros, step)
        for r in range(rows):
            for v in range(vectors):
                parts = sums[r * vectors + v :: rows * vectors]
                total = parts[0] if chains == 1 else w.b.fadd(*parts)
                neurons = packing.neurons_per_vector
                neuron = w.mul(w.add(first, v), neurons)
                if isinstance(first, int):  # in a loop all are there
                    neurons = min(neurons, loops.I - (first + v) * neurons)
                total = _reduce_inputs(loops, w, total, neurons)
                _finish(loops, w, name, total, w.add(i, r), neuron)

    w.tiles(count, packing.tile_rows, tile)


def _reduce_inputs(loops: Loops, w: Writer, total: ir.Value, neurons: int) -> ir.Value:
    """Add up the p partial sums of each neuron, and drop the lanes after the last one."""
    for lanes in range(loops.packing.inputs_per_vector.bit_length() - 1):
        half = loops.L >> (lanes + 1)
        even, odd = (w.shuffle(total, range(first, 2 * half, 2)) for first in (0, 1))
        total = w.b.fadd(even, odd)
    return total if neurons == total.type.count else w.shuffle(total, range(neurons))


def _place(loops: Loops, w: Writer, values: ir.Value, i: ir.Value, neuron: Index) -> ir.Value:
    """The address of what an expert's pair number i has for a neuron."""
    return loops.at_z(w, values, w.add(w.mul(i, loops.I), neuron))


def _finish(loops: Loops, w: Writer, name: str, total: ir.Value, i: ir.Value, neuron: Index) -> None:
    """Write what becomes of a vector of products, those of an expert's pair number i from a neuron on."""
    kind, bias = total.type, w.at(w.arguments[5], neuron)
    z, act, up, dup = (_place(loops, w, values, i, neuron) for values in w.arguments[6:])
    if "bias" in name:
        total = w.b.fadd(total, w.load(bias, kind))
    if "relu" in name:  # a NaN stays one, here and below
        total = w.b.select(w.b.fcmp_ordered("<", total, w.zero(kind)), w.zero(kind), total)
    if "square" in name:
        total = w.b.fmul(total, total)
    if "times" in name:
        total = w.b.fmul(total, loops.load_z(w, act, kind))
    if "mask" in name or "slope" in name:
        squared, value = "slope" in name, loops.load_z(w, act, kind)
        if "gated" in name:
            loops.store_z(w, w.b.fmul(total, w.b.fmul(value, value) if squared else value), dup)
            total = w.b.fmul(total, loops.load_z(w, up, kind))
        if squared:
            total = w.b.fmul(total, w.b.fadd(value, value))
        else:
            total = w.b.select(w.b.fcmp_unordered(">", value, w.zero(kind)), total, w.zero(kind))
    loops.store_z(w, total, z)


def _split(vectors: int, most: int) -> tuple[int, list[tuple[int, int]]]:
    """Split a number of vectors into groups of at most `most`: how many go in a loop, and (first, how many) of others.

    Those others are as equal as possible: a single vector would be slow.
    """
    count = -(-vectors // most)
    looped = count - 2 if count > MOST_WRITTEN_OUT else 0
    start, count = looped * most, count - looped
    bounds = [start + (vectors - start) * i // count for i in range(count + 1)]
    return start, [(first, after - first) for first, after in itertools.pairwise(bounds)]
