# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: ARG001, E741, SIM108 - arguments read by the tuner only; `I` is a size; branches are compiled apart
"""Triton kernels of the sparse FFN: no K-fold copy of the tokens goes in; one comes out and is summed.

Rows r = 0..R-1 are the R = T·K (token, slot) pairs in expert order (`routing.py`), token(r) = order_r // K,
and e is the expert of row r. With x the input, g the gradient of the output and γ_r the gate:

    up            h_r  = act(up_e x_token(r) + bias_e)               x is gathered while it is loaded
    down          z_r  = γ_r downᵀ_e h_r;      y_t = Σ_k z_position(t,k)
    hidden_grad   s_r  = down_e g_token(r);    ∂γ_r = s_r · h_r;    a_r = γ_r s_r ⊙ act'       so is g
    down again    zx_r = upᵀ_e a_r;            ∂x_t = Σ_k zx_position(t,k)
    weight_grad   ∂up_e = Σ_r a_r x_token(r)ᵀ; ∂down_e = Σ_r γ_r h_r g_token(r)ᵀ;    ∂bias_e = Σ_r a_r

Products accumulate in float32. Both projections are seen as [F, D] with strides, whatever layout they are
stored in. A block of BLOCK_M rows belongs to one expert; each program finds its own block from the experts'
row counts, so the grid needs only an upper bound and the block size is free to be tuned. Programs run in
groups of GROUP_M blocks, so that those at work together share weights and rows in the L2 cache.

Needs triton: imported only through `triton_path`.
Shapes: T tokens, D d_model, E experts, I neurons per expert, K experts per token, R = T·K rows.
Sources: Triton's matrix multiplication tutorial (grouped order); ScatterMoE, arXiv 2403.08245 (gather
within).
"""

from __future__ import annotations

import triton
import triton.language as tl

from switchable.compute.cuda.triton import tuning

GROUP_M = tl.constexpr(8)
# Triton's interpreter has no bfloat16 product: it multiplies the bit patterns. Widening is exact.
WIDEN = tl.constexpr(tuning.INTERPRETED)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _tile(NUM_N: tl.constexpr):
    """Return this program's (row block, column block): columns outermost in groups of GROUP_M row blocks."""
    pid = tl.program_id(0)
    num_m = tl.num_programs(0) // NUM_N
    first_m = pid // (GROUP_M * NUM_N) * GROUP_M
    size_m = tl.minimum(num_m - first_m, GROUP_M)
    within = pid % (GROUP_M * NUM_N)
    return first_m + within % size_m, within // size_m


@triton.jit
def _block(pid_m, ends_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return (expert, first row, end of the expert's rows) of row block pid_m; first >= end if none."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends_ptr + e, mask=e < E, other=0)
    start = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    blocks = (end - start + BLOCK_M - 1) // BLOCK_M
    blocks_end = tl.cumsum(blocks, 0)
    expert = tl.sum((blocks_end <= pid_m).to(tl.int32), 0)
    mine = (e == expert).to(tl.int32)
    first = tl.sum(mine * (start + (pid_m - (blocks_end - blocks)) * BLOCK_M), 0)
    return expert, first, tl.sum(mine * end, 0)


@triton.jit
def _offsets(width, columns, BLOCK_M: tl.constexpr):
    """Return the offsets of a tile from its first row, in 32 bits: 64-bit ones would not fit in registers."""
    return tl.arange(0, BLOCK_M)[:, None] * width + columns[None, :]


@triton.jit
def _load(ptrs, mask, WHOLE: tl.constexpr):
    if WHOLE:
        block = tl.load(ptrs)
    else:
        block = tl.load(ptrs, mask=mask, other=0.0)
    return block


@triton.jit
def _product(
    a_ptrs,  # [BLOCK_M, BLOCK_K] pointers, advanced by BLOCK_K
    w_ptrs,  # [BLOCK_K, BLOCK_N] pointers, advanced by BLOCK_K · w_step
    w_step,
    columns,  # [BLOCK_N] below N where the result is wanted
    N: tl.constexpr,
    DEPTH: tl.constexpr,  # length of the summed dimension
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    k = tl.arange(0, BLOCK_K)
    for k0 in range(0, DEPTH, BLOCK_K):
        inside = k < DEPTH - k0
        a = _load(a_ptrs, inside[None, :], DEPTH % BLOCK_K == 0)
        w = _load(
            w_ptrs, inside[:, None] & (columns < N)[None, :], (DEPTH % BLOCK_K == 0) and (N % BLOCK_N == 0)
        )
        acc = _dot(a, w, acc, PRECISION)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * w_step
    return acc


@triton.autotune(tuning.ROWS, ["bucket", "D", "I", "w_stride_d"], tuning.UP, cache_results=True)
@triton.jit(do_not_specialize=["bucket"])
def up_kernel(
    x_ptr,
    x_stride,
    w_ptr,  # up [F, D]
    w_stride_f,
    w_stride_d,
    bias_ptr,
    h_ptr,  # out: [R, I]
    order_ptr,
    ends_ptr,
    bucket,  # read by the tuner only
    D: tl.constexpr,
    I: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SQUARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_m, pid_n = _tile((I + BLOCK_N - 1) // BLOCK_N)
    expert, first, end = _block(pid_m, ends_ptr, E, BLOCK_E, BLOCK_M)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    i = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one: loads need no mask, and the store leaves them out.
    tokens = tl.load(order_ptr + tl.minimum(rows, end - 1)) // K
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * x_stride + k[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * I * w_stride_f + i[None, :] * w_stride_f + k[:, None] * w_stride_d
    h = _product(x_ptrs, w_ptrs, w_stride_d, i, I, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    if HAS_BIAS:
        h += tl.load(bias_ptr + expert * I + i, mask=i < I, other=0.0).to(tl.float32)[None, :]
    h = tl.where(h < 0.0, 0.0, h)  # unlike a maximum with zero, this lets NaN through
    if SQUARED:
        h = h * h
    inside = (rows < end)[:, None] & (i < I)[None, :]
    h_ptrs = h_ptr + first.to(tl.int64) * I + _offsets(I, i, BLOCK_M)
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_grad_columns(
    s, i, live, gates, h_ptr, a_ptr, scaled_ptr, I, SQUARED, GATED, BLOCK_M: tl.constexpr
):
    """Finish columns i of a tile of `hidden_grad_kernel`, pointers at its first row; return Σ_i s_i h_i."""
    inside = live[:, None] & (i < I)[None, :]
    offsets = _offsets(I, i, BLOCK_M)
    h = tl.load(h_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    part = tl.sum(s * h, 1)
    if GATED:
        s = s * gates[:, None]
        tl.store(scaled_ptr + offsets, (h * gates[:, None]).to(scaled_ptr.dtype.element_ty), mask=inside)
    if SQUARED:  # h = a², so act'(a) = 2a = 2√h
        s = s * (2.0 * tl.sqrt(h))
    else:
        s = tl.where(h > 0.0, s, 0.0)
    tl.store(a_ptr + offsets, s.to(a_ptr.dtype.element_ty), mask=inside)
    return part


@triton.autotune(tuning.ROWS, ["bucket", "D", "I", "w_stride_d"], tuning.UP, cache_results=True)
@triton.jit(do_not_specialize=["bucket", "num_rows"])
def hidden_grad_kernel(
    g_ptr,
    g_stride,
    w_ptr,  # down [F, D]
    w_stride_f,
    w_stride_d,
    h_ptr,
    gates_ptr,
    a_ptr,  # out: gradient before the activation [R, I]
    scaled_ptr,  # out, with GATED: γ_r h_r [R, I]
    parts_ptr,  # out, with GATE_GRAD: pieces of the gates' gradient [PARTS, R], R in the order of the pairs
    order_ptr,
    ends_ptr,
    num_rows,
    bucket,
    D: tl.constexpr,
    I: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SQUARED: tl.constexpr,
    GATED: tl.constexpr,
    GATE_GRAD: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    NUM_N: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    pid_m, pid_n = _tile(NUM_N)
    expert, first, end = _block(pid_m, ends_ptr, E, BLOCK_E, BLOCK_M)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    i = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    pairs = tl.load(order_ptr + tl.minimum(rows, end - 1))
    g_ptrs = g_ptr + (pairs // K).to(tl.int64)[:, None] * g_stride + k[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * I * w_stride_f + i[None, :] * w_stride_f + k[:, None] * w_stride_d
    s = _product(g_ptrs, w_ptrs, w_stride_d, i, I, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    live = rows < end
    gates = tl.full((BLOCK_M,), 1.0, tl.float32)
    if GATED:
        gates = tl.load(gates_ptr + pairs).to(tl.float32)
    # Half the columns at a time: a whole block of float32 and what belongs to it would not fit in registers.
    half: tl.constexpr = BLOCK_N // 2
    s_left, s_right = tl.split(tl.permute(tl.reshape(s, (BLOCK_M, 2, half)), (0, 2, 1)))
    own = first.to(tl.int64) * I
    h_ptr, a_ptr, scaled_ptr = h_ptr + own, a_ptr + own, scaled_ptr + own
    i = pid_n * BLOCK_N + tl.arange(0, half)
    part = _hidden_grad_columns(s_left, i, live, gates, h_ptr, a_ptr, scaled_ptr, I, SQUARED, GATED, BLOCK_M)
    i += half
    part += _hidden_grad_columns(
        s_right, i, live, gates, h_ptr, a_ptr, scaled_ptr, I, SQUARED, GATED, BLOCK_M
    )
    if GATE_GRAD:
        tl.store(parts_ptr + pid_n * num_rows + pairs, part, mask=live)
        if pid_n == 0:  # the pieces that this block size leaves over
            for piece in range(NUM_N, PARTS):
                tl.store(parts_ptr + piece * num_rows + pairs, tl.zeros((BLOCK_M,), tl.float32), mask=live)


@triton.autotune(
    tuning.ROWS,
    ["bucket", "D", "I", "w_stride_d", "GATED", "ATOMIC"],
    tuning.DOWN,
    pre_hook=tuning.clear_sums,
    cache_results=True,
)
@triton.jit(do_not_specialize=["bucket"])
def down_kernel(
    h_ptr,  # [R, I]
    w_ptr,  # [F, D]
    w_stride_f,
    w_stride_d,
    gates_ptr,
    out_ptr,  # out: [R, D]; with ATOMIC, zeros [T, D] in float32 to add to
    order_ptr,
    ends_ptr,
    bucket,
    D: tl.constexpr,
    I: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GATED: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_m, pid_n = _tile((D + BLOCK_N - 1) // BLOCK_N)
    expert, first, end = _block(pid_m, ends_ptr, E, BLOCK_E, BLOCK_M)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    d = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    h_ptrs = h_ptr + tl.minimum(rows, end - 1).to(tl.int64)[:, None] * I + k[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * I * w_stride_f + k[:, None] * w_stride_f + d[None, :] * w_stride_d
    z = _product(h_ptrs, w_ptrs, w_stride_f, d, D, I, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    pairs = tl.load(order_ptr + tl.minimum(rows, end - 1))
    if GATED:
        z = z * tl.load(gates_ptr + pairs).to(tl.float32)[:, None]
    inside = (rows < end)[:, None] & (d < D)[None, :]
    if ATOMIC:
        out_ptrs = out_ptr + (pairs // K).to(tl.int64)[:, None] * D + d[None, :]
        tl.atomic_add(out_ptrs, z, mask=inside, sem="relaxed")
    else:
        out_ptrs = out_ptr + first.to(tl.int64) * D + _offsets(D, d, BLOCK_M)
        tl.store(out_ptrs, z.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(z_ptr, y_ptr, position_ptr, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr):
    """y_t = Σ_k z_position(t,k), in float32, always in the order of k."""
    t = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(position_ptr + t * K + k).to(tl.int64)
        acc += tl.load(z_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + t.to(tl.int64) * D + d, acc.to(y_ptr.dtype.element_ty), mask=d < D)


@triton.autotune(tuning.WEIGHTS, ["bucket", "D", "I", "w_stride_d"], tuning.WEIGHT_GRAD, cache_results=True)
@triton.jit(do_not_specialize=["bucket"])
def weight_grad_kernel(
    p_ptr,  # [R, I]
    x_ptr,  # [T, D]
    x_stride,
    w_ptr,  # out: Σ_r p_r x_token(r)ᵀ [F, D]
    w_stride_f,
    w_stride_d,
    order_ptr,
    ends_ptr,
    bucket,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # neurons
    BLOCK_N: tl.constexpr,  # columns of D
    BLOCK_K: tl.constexpr,  # rows summed at a time
):
    NUM_I: tl.constexpr = (I + BLOCK_M - 1) // BLOCK_M
    NUM_D: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) % (NUM_I * NUM_D)
    expert = tl.program_id(0) // (NUM_I * NUM_D)
    i = tile % NUM_I * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tile // NUM_I * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        live = rows < end
        tokens = tl.load(order_ptr + rows, mask=live, other=0) // K
        p_ptrs = p_ptr + rows.to(tl.int64)[None, :] * I + i[:, None]
        x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * x_stride + d[None, :]
        p = tl.load(p_ptrs, mask=live[None, :] & (i < I)[:, None], other=0.0)
        x = tl.load(x_ptrs, mask=live[:, None] & (d < D)[None, :], other=0.0)
        acc = _dot(p, x, acc, PRECISION)
    own = expert.to(tl.int64) * I * w_stride_f + i[:, None] * w_stride_f + d[None, :] * w_stride_d
    tl.store(w_ptr + own, acc.to(w_ptr.dtype.element_ty), mask=(i < I)[:, None] & (d < D)[None, :])


@triton.jit
def bias_grad_kernel(
    a_ptr,  # [R, I]
    bias_ptr,  # out: Σ_r a_r [F]
    ends_ptr,
    I: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    expert = tl.program_id(0)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    acc = tl.zeros((BLOCK_R, BLOCK_I), dtype=tl.float32)
    for first in range(start, end, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        a_ptrs = a_ptr + rows.to(tl.int64)[:, None] * I + i[None, :]
        acc += tl.load(a_ptrs, mask=(rows < end)[:, None] & (i < I)[None, :], other=0.0).to(tl.float32)
    tl.store(bias_ptr + expert * I + i, tl.sum(acc, 0).to(bias_ptr.dtype.element_ty), mask=i < I)
