"""FlashAttention on a GPU: what `Tiled` in attention.py does, as Triton kernels over packed tokens.

Triton (Tillet et al. 2019) compiles a Python function, the kernel, into a program that runs many
times in parallel, each time on one tile of the work. Here a program computes a block of queries (or
of keys) of one head of one sequence, which it finds by the cumulative lengths: nothing is padded,
and sequences do not mix. It loops over the blocks of keys (or of queries) and keeps its sums in
registers. Scores never leave the chip; attention is limited by memory traffic, not by arithmetic
(FlashAttention, Dao et al. 2022).

The last block of a loop has rows past the end of the sequence, unless the length is a multiple of
the block. Only this block needs masks. So the loop takes the whole blocks, and the last one comes
after it, by the same function.

dq is a sum over keys, while dk and dv are sums over queries. So there are two backward kernels, and
each recomputes the scores. (FlashAttention-2, Dao 2023, computes them once and adds up dq with
atomics.) Each number is summed by one program in a fixed order: equal inputs give equal bits.

Powers are of 2, as in the hardware: exp(x) = 2^(x·log₂e), and lse = log₂ Σ 2^score. Row numbers are
int64 where they are multiplied by a stride, since T·H·D may be too large for int32.
"""

import math
import os

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
# TRITON_INTERPRET=1 runs the kernels in numpy, for tests on a machine without a GPU.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def find_work(cu_seqlens, H):
    """The first row of the sequence of this program, how many rows it has, and the head."""
    sequence, head = tl.program_id(0) // H, tl.program_id(0) % H
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    return start.to(tl.int64), length, head.to(tl.int64)


@triton.jit
def rows_of(matrix, rows, stride, D: tl.constexpr):
    """Pointers to these rows of a matrix of D columns: a tile (rows, D)."""
    return matrix + rows.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]


@triton.jit
def columns_of(matrix, rows, stride, D: tl.constexpr):
    """The same transposed: a tile (D, rows)."""
    return matrix + rows.to(tl.int64)[None, :] * stride + tl.arange(0, D)[:, None]


@triton.jit
def matmul(a, b, total=None):
    """a @ b + total, in float32; "ieee": float32 inputs are not rounded to TensorFloat-32."""
    if INTERPRETED:  # numpy has no bfloat16 and would multiply its bits as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def forward_block(q, kT, v, is_key, top, total, out):
    """One block of keys of the online softmax. `is_key` (keys,) is None where all of them are."""
    scale: tl.constexpr = q.shape[1] ** -0.5 * LOG2_E
    scores = matmul(q, kT)
    if is_key is not None:
        scores = tl.where(is_key[None, :], scores, float("-inf"))
    # Scaling the largest score of a row is cheaper than scaling all of them before.
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    correction = tl.exp2(top - new_top)  # 0 for the first block
    total = correction * total + tl.sum(weights, 1)
    out = matmul(weights.to(v.dtype), v, correction[:, None] * out)
    return new_top, total, out


@triton.jit
def forward_kernel(
    Q, K, V, Out, Lse, cu_q, cu_k, M, H,
    q_stride, q_head_stride, kv_stride, kv_head_stride,
    D: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Out and Lse for a block of queries: the online softmax over blocks of keys."""
    q_first, q_count, head = find_work(cu_q, H)
    k_first, k_count, _ = find_work(cu_k, H)
    if tl.program_id(1) * QUERY_BLOCK >= q_count:  # as many programs as the longest one needs
        return
    q_start = q_first * q_stride + head * q_head_stride
    kv_start = k_first * kv_stride + head * kv_head_stride
    out_start, sums_start = (q_first * H + head) * D, head * M + q_first
    queries = tl.program_id(1) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    is_query = queries < q_count
    q = tl.load(rows_of(Q + q_start, queries, q_stride, D), mask=is_query[:, None], other=0.0)
    keys = tl.arange(0, KEY_BLOCK)
    k_next = columns_of(K + kv_start, keys, kv_stride, D)
    v_next = rows_of(V + kv_start, keys, kv_stride, D)
    top = tl.full((QUERY_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((QUERY_BLOCK,), tl.float32)
    out = tl.zeros((QUERY_BLOCK, D), tl.float32)
    whole = k_count // KEY_BLOCK * KEY_BLOCK  # keys in whole blocks
    for _ in range(0, whole, KEY_BLOCK):
        kT, v = tl.load(k_next), tl.load(v_next)
        top, total, out = forward_block(q, kT, v, None, top, total, out)
        k_next += KEY_BLOCK * kv_stride
        v_next += KEY_BLOCK * kv_stride
    if whole < k_count:
        is_key = whole + keys < k_count
        kT = tl.load(k_next, mask=is_key[None, :], other=0.0)
        v = tl.load(v_next, mask=is_key[:, None], other=0.0)
        top, total, out = forward_block(q, kT, v, is_key, top, total, out)
    out_rows = rows_of(Out + out_start, queries, H * D, D)
    tl.store(out_rows, (out / total[:, None]).to(Out.dtype.element_ty), mask=is_query[:, None])
    tl.store(Lse + sums_start + queries, top + tl.log2(total), mask=is_query)


@triton.jit
def delta_kernel(Out, dOut, Delta, M, H, D: tl.constexpr, ROWS: tl.constexpr):
    """Delta (H, M), the row sums of dOut ∘ Out, for the two kernels below."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < M
    out = tl.load(rows_of(Out + head * D, rows, H * D, D), mask=is_row[:, None], other=0.0)
    d_out = tl.load(rows_of(dOut + head * D, rows, H * D, D), mask=is_row[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(Delta + head.to(tl.int64) * M + rows, delta, mask=is_row)


@triton.jit
def dq_block(q, kT, vT, d_out, lse, delta, is_key, dq):
    """dq, and what one block of keys adds to it."""
    scale: tl.constexpr = q.shape[1] ** -0.5 * LOG2_E
    weights = tl.exp2(matmul(q, kT) * scale - lse[:, None])
    if is_key is not None:
        # Past the last key scores are 0, not −∞, and may be far above lse: ∞ · 0 would be NaN.
        weights = tl.where(is_key[None, :], weights, 0.0)
    d_scores = weights * (matmul(d_out, vT) - delta[:, None])
    return matmul(d_scores.to(kT.dtype), tl.trans(kT), dq)


@triton.jit
def dq_kernel(
    Q, K, V, dOut, Lse, Delta, dQ, cu_q, cu_k, M, H,
    q_stride, q_head_stride, kv_stride, kv_head_stride, dq_stride,
    D: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """dQ for a block of queries."""
    q_first, q_count, head = find_work(cu_q, H)
    k_first, k_count, _ = find_work(cu_k, H)
    if tl.program_id(1) * QUERY_BLOCK >= q_count:
        return
    q_start = q_first * q_stride + head * q_head_stride
    kv_start = k_first * kv_stride + head * kv_head_stride
    out_start, sums_start = (q_first * H + head) * D, head * M + q_first
    queries = tl.program_id(1) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    is_query = queries < q_count
    q = tl.load(rows_of(Q + q_start, queries, q_stride, D), mask=is_query[:, None], other=0.0)
    d_out_rows = rows_of(dOut + out_start, queries, H * D, D)
    d_out = tl.load(d_out_rows, mask=is_query[:, None], other=0.0)
    lse = tl.load(Lse + sums_start + queries, mask=is_query, other=0.0)
    delta = tl.load(Delta + sums_start + queries, mask=is_query, other=0.0)
    keys = tl.arange(0, KEY_BLOCK)
    k_next = columns_of(K + kv_start, keys, kv_stride, D)
    v_next = columns_of(V + kv_start, keys, kv_stride, D)
    dq = tl.zeros((QUERY_BLOCK, D), tl.float32)
    whole = k_count // KEY_BLOCK * KEY_BLOCK
    for _ in range(0, whole, KEY_BLOCK):
        kT, vT = tl.load(k_next), tl.load(v_next)
        dq = dq_block(q, kT, vT, d_out, lse, delta, None, dq)
        k_next += KEY_BLOCK * kv_stride
        v_next += KEY_BLOCK * kv_stride
    if whole < k_count:
        is_key = whole + keys < k_count
        kT = tl.load(k_next, mask=is_key[None, :], other=0.0)
        vT = tl.load(v_next, mask=is_key[None, :], other=0.0)
        dq = dq_block(q, kT, vT, d_out, lse, delta, is_key, dq)
    dq_rows = rows_of(dQ + q_first * dq_stride + head * D, queries, dq_stride, D)
    tl.store(dq_rows, (dq * D**-0.5).to(dQ.dtype.element_ty), mask=is_query[:, None])


@triton.jit
def dkdv_block(qT, k, v, d_out, lse, delta, dk, dv):
    """dk and dv, and what a block of queries adds to them. Scores are (keys, queries) here."""
    scale: tl.constexpr = k.shape[1] ** -0.5 * LOG2_E
    weights = tl.exp2(matmul(k, qT) * scale - lse[None, :])
    dv = matmul(weights.to(d_out.dtype), d_out, dv)
    d_scores = weights * (matmul(v, tl.trans(d_out)) - delta[None, :])
    dk = matmul(d_scores.to(qT.dtype), tl.trans(qT), dk)
    return dk, dv


@triton.jit
def dkdv_kernel(
    Q, K, V, dOut, Lse, Delta, dK, dV, cu_q, cu_k, M, H,
    q_stride, q_head_stride, kv_stride, kv_head_stride, dkv_stride,
    D: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """dK and dV for a block of keys."""
    q_first, q_count, head = find_work(cu_q, H)
    k_first, k_count, _ = find_work(cu_k, H)
    if tl.program_id(1) * KEY_BLOCK >= k_count:
        return
    q_start = q_first * q_stride + head * q_head_stride
    kv_start = k_first * kv_stride + head * kv_head_stride
    out_start, sums_start = (q_first * H + head) * D, head * M + q_first
    keys = tl.program_id(1) * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    is_key = keys < k_count  # other rows are wrong, affect no other row and are not stored
    k = tl.load(rows_of(K + kv_start, keys, kv_stride, D), mask=is_key[:, None], other=0.0)
    v = tl.load(rows_of(V + kv_start, keys, kv_stride, D), mask=is_key[:, None], other=0.0)
    queries = tl.arange(0, QUERY_BLOCK)
    q_next = columns_of(Q + q_start, queries, q_stride, D)
    d_out_next = rows_of(dOut + out_start, queries, H * D, D)
    lse_next, delta_next = Lse + sums_start + queries, Delta + sums_start + queries
    dk = tl.zeros((KEY_BLOCK, D), tl.float32)
    dv = tl.zeros((KEY_BLOCK, D), tl.float32)
    whole = q_count // QUERY_BLOCK * QUERY_BLOCK
    for _ in range(0, whole, QUERY_BLOCK):
        qT, d_out = tl.load(q_next), tl.load(d_out_next)
        lse, delta = tl.load(lse_next), tl.load(delta_next)
        dk, dv = dkdv_block(qT, k, v, d_out, lse, delta, dk, dv)
        q_next += QUERY_BLOCK * q_stride
        d_out_next += QUERY_BLOCK * H * D
        lse_next += QUERY_BLOCK
        delta_next += QUERY_BLOCK
    if whole < q_count:
        # Past the last query q, d_out and delta are 0 and add nothing.
        is_query = whole + queries < q_count
        qT = tl.load(q_next, mask=is_query[None, :], other=0.0)
        d_out = tl.load(d_out_next, mask=is_query[:, None], other=0.0)
        lse = tl.load(lse_next, mask=is_query, other=0.0)
        delta = tl.load(delta_next, mask=is_query, other=0.0)
        dk, dv = dkdv_block(qT, k, v, d_out, lse, delta, dk, dv)
    dkv_start = k_first * dkv_stride + head * D
    dk_rows = rows_of(dK + dkv_start, keys, dkv_stride, D)
    dv_rows = rows_of(dV + dkv_start, keys, dkv_stride, D)
    tl.store(dk_rows, (dk * D**-0.5).to(dK.dtype.element_ty), mask=is_key[:, None])
    tl.store(dv_rows, dv.to(dV.dtype.element_ty), mask=is_key[:, None])
