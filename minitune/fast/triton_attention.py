"""FlashAttention on a GPU: what `Tiled` in attention.py does, as Triton kernels over packed tokens.

Triton (Tillet et al. 2019) compiles a Python function, the kernel, into a program that runs many
times in parallel, each time on one tile of the work. Here a program computes a block of queries (or
of keys) of one head of one sequence, which it finds by the cumulative lengths: nothing is padded,
and sequences do not mix. It loops over the blocks of keys (or of queries) and keeps its sums in
registers. Scores never leave the chip; attention is limited by memory traffic, not by arithmetic
(FlashAttention, Dao et al. 2022).

dq is a sum over keys, while dk and dv are sums over queries. So there are two backward kernels, and
each recomputes the scores. (FlashAttention-2, Dao 2023, computes them once and adds up dq with
atomics.) Each number is summed by one program in a fixed order: equal inputs give equal bits.

Powers are of 2, as in the hardware: exp(x) = 2^(x·log₂e), and lse = log₂ Σ 2^score. Row numbers are
int64 where they are multiplied by a stride, since T·H·D may be too large for int32.
"""

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2_E = tl.constexpr(math.log2(math.e))
# By the bytes of a number; TILE is the number of queries or keys in a block. Not tuned for speed,
# but chosen to fit at D = 128 into registers and into the 99 kB of shared memory of a gaming GPU.
TILES = {
    2: {"TILE": 64, "num_warps": 4, "num_stages": 2},
    4: {"TILE": 32, "num_warps": 8, "num_stages": 2},
}
# TRITON_INTERPRET=1 runs the kernels in numpy, for tests on a machine without a GPU.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def find_work(cu_seqlens, T, H, stride, head_stride, D: tl.constexpr):
    """Where the sequence and the head of this program begin among T rows, and the length.

    There are three offsets: into a tensor with these strides, into a contiguous tensor (T, H, D),
    and into one (H, T).
    """
    sequence, head = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    first = start.to(tl.int64)
    return first * stride + head * head_stride, (first * H + head) * D, head * T + first, length


@triton.jit
def load(matrix, rows, length, stride, D: tl.constexpr):
    """These rows of a matrix (length, D) as a tile; rows from `length` on are zeros."""
    tile = matrix + rows.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(tile, mask=(rows < length)[:, None], other=0.0)


@triton.jit
def store(matrix, rows, length, stride, D: tl.constexpr, values):
    """Write a tile to where `load` would read it, in the dtype of the matrix."""
    tile = matrix + rows.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(tile, values.to(matrix.dtype.element_ty), mask=(rows < length)[:, None])


@triton.jit
def matmul(a, b):
    """a @ b, summed in float32; "ieee": float32 inputs are not rounded to TensorFloat-32."""
    if INTERPRETED:  # numpy has no bfloat16 and would multiply its bits as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def forward_kernel(
    Q, K, V, Out, Lse, cu_q, cu_k, M, T, H,
    q_stride, q_head_stride, kv_stride, kv_head_stride,
    D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Out and Lse for a block of queries: the online softmax over blocks of keys."""
    q_start, out_start, sums_start, q_count = find_work(cu_q, M, H, q_stride, q_head_stride, D)
    kv_start, _, _, k_count = find_work(cu_k, T, H, kv_stride, kv_head_stride, D)
    if tl.program_id(1) * TILE >= q_count:  # there are as many programs as the longest one needs
        return
    queries = tl.program_id(1) * TILE + tl.arange(0, TILE)
    q = load(Q + q_start, queries, q_count, q_stride, D)
    top = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    out = tl.zeros((TILE, D), tl.float32)
    for start in range(0, k_count, TILE):
        keys = start + tl.arange(0, TILE)
        k = load(K + kv_start, keys, k_count, kv_stride, D)
        v = load(V + kv_start, keys, k_count, kv_stride, D)
        scores = matmul(q, tl.trans(k)) * (D**-0.5 * LOG2_E)
        scores = tl.where((keys < k_count)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        correction = tl.exp2(top - new_top)
        total = correction * total + tl.sum(weights, 1)
        out = correction[:, None] * out + matmul(weights.to(v.dtype), v)
        top = new_top
    store(Out + out_start, queries, q_count, H * D, D, out / total[:, None])
    tl.store(Lse + sums_start + queries, top + tl.log2(total), mask=queries < q_count)


@triton.jit
def dq_kernel(
    Q, K, V, Out, dOut, Lse, Delta, dQ, cu_q, cu_k, M, T, H,
    q_stride, q_head_stride, kv_stride, kv_head_stride,
    D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dQ for a block of queries, and Delta, the row sums of dOut ∘ Out, for `dkdv_kernel`."""
    q_start, out_start, sums_start, q_count = find_work(cu_q, M, H, q_stride, q_head_stride, D)
    kv_start, _, _, k_count = find_work(cu_k, T, H, kv_stride, kv_head_stride, D)
    if tl.program_id(1) * TILE >= q_count:
        return
    queries = tl.program_id(1) * TILE + tl.arange(0, TILE)
    q = load(Q + q_start, queries, q_count, q_stride, D)
    out = load(Out + out_start, queries, q_count, H * D, D)
    d_out = load(dOut + out_start, queries, q_count, H * D, D)
    lse = tl.load(Lse + sums_start + queries, mask=queries < q_count, other=0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(Delta + sums_start + queries, delta, mask=queries < q_count)
    dq = tl.zeros((TILE, D), tl.float32)
    for start in range(0, k_count, TILE):
        keys = start + tl.arange(0, TILE)
        k = load(K + kv_start, keys, k_count, kv_stride, D)
        v = load(V + kv_start, keys, k_count, kv_stride, D)
        weights = tl.exp2(matmul(q, tl.trans(k)) * (D**-0.5 * LOG2_E) - lse[:, None])
        # Past the last key scores are 0, not −∞, and may be far above lse: ∞ · 0 would be NaN.
        weights = tl.where((keys < k_count)[None, :], weights, 0.0)
        d_scores = weights * (matmul(d_out, tl.trans(v)) - delta[:, None])
        dq += matmul(d_scores.to(k.dtype), k)
    store(dQ + out_start, queries, q_count, H * D, D, dq * D**-0.5)


@triton.jit
def dkdv_kernel(
    Q, K, V, dOut, Lse, Delta, dK, dV, cu_q, cu_k, M, T, H,
    q_stride, q_head_stride, kv_stride, kv_head_stride,
    D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dK and dV for a block of keys. Scores are (keys, queries), as both sums need them."""
    q_start, out_start, sums_start, q_count = find_work(cu_q, M, H, q_stride, q_head_stride, D)
    kv_start, dkv_start, _, k_count = find_work(cu_k, T, H, kv_stride, kv_head_stride, D)
    if tl.program_id(1) * TILE >= k_count:
        return
    keys = tl.program_id(1) * TILE + tl.arange(0, TILE)
    k = load(K + kv_start, keys, k_count, kv_stride, D)
    v = load(V + kv_start, keys, k_count, kv_stride, D)
    dk = tl.zeros((TILE, D), tl.float32)
    dv = tl.zeros((TILE, D), tl.float32)
    for start in range(0, q_count, TILE):
        # Past the last query q, d_out and delta are 0 and add nothing. Past the last key the tile
        # has wrong rows, which affect no other row and are not stored.
        queries = start + tl.arange(0, TILE)
        q = load(Q + q_start, queries, q_count, q_stride, D)
        d_out = load(dOut + out_start, queries, q_count, H * D, D)
        lse = tl.load(Lse + sums_start + queries, mask=queries < q_count, other=0.0)
        delta = tl.load(Delta + sums_start + queries, mask=queries < q_count, other=0.0)
        weights = tl.exp2(matmul(k, tl.trans(q)) * (D**-0.5 * LOG2_E) - lse[None, :])
        dv += matmul(weights.to(d_out.dtype), d_out)
        d_scores = weights * (matmul(v, tl.trans(d_out)) - delta[None, :])
        dk += matmul(d_scores.to(q.dtype), q)
    store(dK + dkv_start, keys, k_count, H * D, D, dk * D**-0.5)
    store(dV + dkv_start, keys, k_count, H * D, D, dv)


class Fused(torch.autograd.Function):
    """Attention by the kernels above, for float32, float16 or bfloat16 and D of 32, 64 or 128.

    Shapes as in attention.py. It saves q, k, v, the output and lse, and all sums are float32.
    """

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
    ) -> Tensor:
        # The model's q, k and v are views of one tensor (T, 3, H, D), and are not copied.
        if q.stride(-1) != 1:
            q = q.contiguous()
        if k.stride() != v.stride() or k.stride(-1) != 1:
            k, v = k.contiguous(), v.contiguous()
        M, H, D = q.shape
        out, lse = q.new_empty(M, H, D), q.new_empty(H, M, dtype=torch.float32)
        launch(forward_kernel, (q, k, v, out, lse), cu_seqlens_q, cu_seqlens, max_seqlen)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens)
        ctx.max_seqlen = max_seqlen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *cu_seqlens = ctx.saved_tensors
        d_out, delta = d_out.contiguous(), torch.empty_like(lse)
        dq, dk, dv = torch.empty_like(out), k.new_empty(k.shape), v.new_empty(v.shape)
        launch(dq_kernel, (q, k, v, out, d_out, lse, delta, dq), *cu_seqlens, ctx.max_seqlen)
        launch(dkdv_kernel, (q, k, v, d_out, lse, delta, dk, dv), *cu_seqlens, ctx.max_seqlen)
        return dq, dk, dv, None, None, None


def launch(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor, ...],
    cu_seqlens_q: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> None:
    """Run a kernel for each tile of each head of each sequence; `tensors` begin with q and k."""
    q, k, *_ = tensors
    (M, H, D), T = q.shape, k.size(0)
    tile = TILES[q.element_size()]
    # CUDA allows 2³¹ programs along the first axis, and 65,535 along the second.
    grid = (cu_seqlens.numel() - 1) * H, triton.cdiv(max_seqlen, tile["TILE"])
    sizes = M, T, H, *q.stride()[:2], *k.stride()[:2]
    with torch.cuda.device_of(q):  # triton launches on the current GPU
        kernel[grid](*tensors, cu_seqlens_q, cu_seqlens, *sizes, D=D, **tile)
