# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: ARG001, E741, SIM108 - arguments read by the tuner only; `I` is a size; branches are compiled apart
"""Triton kernels of the sparse FFN: tokens are gathered while they are multiplied, K copies of the output are summed.

Rows r = 0..R-1 are the R = T·K (token, slot) pairs in expert order (`../sort.py`), token(r) = order_r // K, and e is
the expert of row r. With x the input and g the gradient of the output:

    expert "up"            h_r  = act(up_e x_token(r) + bias_e)
    expert "down"          z_r  = downᵀ_e h_r;                       combine   y_t  = Σ_k z_position(t,k)
    expert "hidden_grad"   a_r  = (down_e g_token(r)) ⊙ act'
    expert "down"          zx_r = upᵀ_e a_r;                         combine   ∂x_t = Σ_k zx_position(t,k)
    weight_grad            ∂up_e = Σ_r a_r x_token(r)ᵀ;   ∂down_e = Σ_r h_r g_token(r)ᵀ
    bias_grad              ∂bias_e = Σ_r a_r

Products accumulate in float32. Both projections are seen as [F, D] with strides, whatever layout they are stored in.
A block of BLOCK_M rows belongs to one expert. Each program finds its own block from the ends of the experts' rows, so
the grid needs only an upper bound and the block size is free to be tuned.

Shapes: T tokens, D d_model, E experts, I neurons per expert, K experts per token, R = T·K rows.
Sources: Triton's matrix multiplication tutorial (grouped order); ScatterMoE, arXiv 2403.08245 (gather within).
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
def _tile(ends_ptr, NUM_N: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return this program's (expert, first row, end of the expert's rows, column block); first >= end if none."""
    # Columns outermost in groups of GROUP_M row blocks: programs at work together share weights and rows in L2.
    pid = tl.program_id(0)
    num_m = tl.num_programs(0) // NUM_N
    first_m = pid // (GROUP_M * NUM_N) * GROUP_M
    size_m = tl.minimum(num_m - first_m, GROUP_M)
    within = pid % (GROUP_M * NUM_N)
    pid_m, pid_n = first_m + within % size_m, within // size_m
    # The expert of row block pid_m: the number of experts whose blocks all come before it.
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends_ptr + e, mask=e < E, other=0)
    start = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    blocks = (end - start + BLOCK_M - 1) // BLOCK_M
    blocks_end = tl.cumsum(blocks, 0)
    expert = tl.sum((blocks_end <= pid_m).to(tl.int32), 0)
    mine = (e == expert).to(tl.int32)
    first = tl.sum(mine * (start + (pid_m - (blocks_end - blocks)) * BLOCK_M), 0)
    return expert, first, tl.sum(mine * end, 0), pid_n


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
    # Masks cost registers and time, so sizes that blocks divide go without.
    WHOLE_K: tl.constexpr = DEPTH % BLOCK_K == 0
    for k0 in range(0, DEPTH, BLOCK_K):
        inside = k < DEPTH - k0
        a = _load(a_ptrs, inside[None, :], WHOLE_K)
        w = _load(w_ptrs, inside[:, None] & (columns < N)[None, :], WHOLE_K and (N % BLOCK_N == 0))
        acc = _dot(a, w, acc, PRECISION)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * w_step
    return acc


@triton.jit
def _store_hidden_grad(s, m, n, live, h_ptr, out_ptr, N: tl.constexpr, SQUARED: tl.constexpr):
    """Store s ⊙ act' in columns n, the derivative being read off the hidden rows after the activation."""
    offsets = m[:, None] * N + n[None, :]
    inside = live[:, None] & (n < N)[None, :]
    h = tl.load(h_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if SQUARED:  # h = a², so act'(a) = 2a = 2√h
        s = s * (2.0 * tl.sqrt(h))
    else:
        s = tl.where(h > 0.0, s, 0.0)
    tl.store(out_ptr + offsets, s.to(out_ptr.dtype.element_ty), mask=inside)


@triton.autotune(
    tuning.ROWS, ["bucket", "N", "DEPTH", "w_stride_k", "STEP"], tuning.PRUNE, cache_results=True
)
@triton.jit(do_not_specialize=["bucket"], repr=lambda call: f"{call.constants['STEP']}_kernel")
def expert_kernel(
    a_ptr,  # [T, DEPTH]; in the step "down" [R, DEPTH]
    a_stride,
    w_ptr,  # [E, DEPTH, N] by its strides
    w_stride_e,
    w_stride_k,
    w_stride_n,
    bias_ptr,  # [E, N] or None; read in the step "up"
    h_ptr,  # [R, N]; read in the step "hidden_grad"
    out_ptr,  # out: [R, N]
    order_ptr,
    ends_ptr,
    bucket,  # read by the tuner only
    STEP: tl.constexpr,  # "up", "hidden_grad" (these two gather the tokens) or "down"
    SQUARED: tl.constexpr,  # the activation is the square of ReLU
    N: tl.constexpr,
    DEPTH: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert, first, end, pid_n = _tile(ends_ptr, (N + BLOCK_N - 1) // BLOCK_N, E, BLOCK_E, BLOCK_M)
    if first >= end:
        return
    m = tl.arange(0, BLOCK_M)
    live = first + m < end
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one: loads need no mask, and the store leaves them out.
    source = tl.minimum(first + m, end - 1)
    if STEP != "down":
        source = tl.load(order_ptr + source) // K
    a_ptrs = a_ptr + source.to(tl.int64)[:, None] * a_stride + k[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * w_stride_e + n[None, :] * w_stride_n + k[:, None] * w_stride_k
    acc = _product(a_ptrs, w_ptrs, w_stride_k, n, N, DEPTH, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    # 64 bits for the tile's first row, 32 within the tile: 64-bit offsets would not fit in registers.
    out_ptr += first.to(tl.int64) * N
    if STEP == "hidden_grad":
        h_ptr += first.to(tl.int64) * N
        # Half the columns at a time: a whole block of float32 and what belongs to it would not fit in registers.
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        n = pid_n * BLOCK_N + tl.arange(0, HALF)
        _store_hidden_grad(left, m, n, live, h_ptr, out_ptr, N, SQUARED)
        _store_hidden_grad(right, m, n + HALF, live, h_ptr, out_ptr, N, SQUARED)
    else:
        if STEP == "up":
            if bias_ptr is not None:
                acc += tl.load(bias_ptr + expert * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            acc = tl.where(acc < 0.0, 0.0, acc)  # unlike a maximum with zero, this lets NaN through
            if SQUARED:
                acc = acc * acc
        inside = live[:, None] & (n < N)[None, :]
        tl.store(out_ptr + m[:, None] * N + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


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


@triton.autotune(tuning.WEIGHTS, ["bucket", "D", "I", "w_stride_d"], tuning.PRUNE, cache_results=True)
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
