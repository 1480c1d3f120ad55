"""The kernels of triton_attention.py as one operation of torch.

It is registered by its name, with the shapes that it gives and with its gradient. So autograd and
torch.compile know it like one of torch's own, and torch.compile can fuse what stands around it.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from minitune.fast import triton_attention as kernels


class Tile(NamedTuple):
    """What a program computes at a time, and how."""

    QUERY_BLOCK: int
    KEY_BLOCK: int
    num_warps: int  # of 32 threads each
    num_stages: int  # blocks that are loaded while an earlier one is computed, plus 1


# For (forward, dq, dk and dv). All of them fit into the 99 kB of shared memory of small GPUs (8.6,
# 8.9), so that one table is enough for all GPUs.
TILES = {
    # The fastest of 20 on an H100 for heads of 64 and 32k tokens of IMDb.
    "long": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    # The same for snippets of 27 tokens. No block of 128 queries would be full.
    "short": (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
    # For heads of 128, not timed: the largest that fit. With 4 warps registers would spill on 9.0.
    "wide": (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    # Not timed. On a GPU it is for tests.
    "float32": (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
}
DELTA_ROWS = 64
# A product and a sum in one instruction, rounded once: score · scale − top.
FUSE = {"enable_fp_fusion": True}


def choose_tiles(dtype: torch.dtype, D: int, max_seqlen: int) -> tuple[Tile, Tile, Tile]:
    """The row of TILES for heads of D numbers and texts of at most `max_seqlen` tokens."""
    if dtype.itemsize == 4:
        return TILES["float32"]
    if D > 64:
        return TILES["wide"]
    return TILES["short" if max_seqlen < 128 else "long"]


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """(out (M, H, D), lse (H, M)) for q (M, H, D), and k and v (T, H, D) of equal strides."""
    M, H, D = q.shape
    out, lse = q.new_empty(M, H, D), q.new_empty(H, M, dtype=torch.float32)
    tile, _, _ = choose_tiles(q.dtype, D, max_seqlen)
    lengths = cu_seqlens_q, cu_seqlens, max_seqlen
    launch(kernels.forward_kernel, (q, k, v, out, lse), *lengths, tile, tile.QUERY_BLOCK)
    return out, lse


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Write the gradients into dq, dk and dv, whose heads lie side by side."""
    M, H, D = q.shape
    d_out, delta = d_out.contiguous(), torch.empty_like(lse)
    _, dq_tile, dkdv_tile = choose_tiles(q.dtype, D, max_seqlen)
    with torch.cuda.device_of(q):  # triton launches on the current GPU
        grid = triton.cdiv(M, DELTA_ROWS), H
        kernels.delta_kernel[grid](out, d_out, delta, M, H, D=D, ROWS=DELTA_ROWS, **FUSE)
    given, lengths = (q, k, v, d_out, lse, delta), (cu_seqlens_q, cu_seqlens, max_seqlen)
    launch(kernels.dq_kernel, (*given, dq), *lengths, dq_tile, dq_tile.QUERY_BLOCK, dq)
    launch(kernels.dkdv_kernel, (*given, dk, dv), *lengths, dkdv_tile, dkdv_tile.KEY_BLOCK, dk)


@torch.library.custom_op("minitune::attention", mutates_args=())
def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> tuple[Tensor, Tensor]:
    """Attention for float32, float16 or bfloat16 and D of 32, 64 or 128; shapes as in attention.py.

    Returns (out (M, H, D), lse (H, M)). The gradient is that of `out`. For it q, k, v, the output
    and lse are saved, and all sums are float32.
    """
    return forward(*inputs(q, k, v), cu_seqlens_q, cu_seqlens, max_seqlen)


@torch.library.custom_op("minitune::attention_backward", mutates_args=())
def fused_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from what `fused` was given and gave."""
    given, lengths = (d_out, *inputs(q, k, v), out, lse), (cu_seqlens_q, cu_seqlens, max_seqlen)
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    backward(*given, *lengths, *gradients)
    return gradients


@torch.library.custom_op("minitune::self_attention", mutates_args=())
def fused_self(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """The same where all tokens are queries, for contiguous qkv (T, 3, H, D)."""
    return forward(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen)


@torch.library.custom_op("minitune::self_attention_backward", mutates_args=())
def fused_self_backward(
    d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """The gradient (T, 3, H, D) of qkv."""
    gradient, lengths = torch.empty_like(qkv), (cu_seqlens, cu_seqlens, max_seqlen)
    backward(d_out, *qkv.unbind(1), out, lse, *lengths, *gradient.unbind(1))
    return gradient


def inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the strides that the kernels can read: copies, where these are others."""
    if q.stride(-1) != 1:
        q = q.contiguous()
    if k.stride() != v.stride() or k.stride(-1) != 1:
        k, v = k.contiguous(), v.contiguous()
    return q, k, v


def launch(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor, ...],
    cu_seqlens_q: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    tile: Tile,
    block: int,
    gradient: Tensor | None = None,
) -> None:
    """Run a kernel for each block of each head of each sequence; `tensors` begin with q and k."""
    q, k, *_ = tensors
    M, H, D = q.shape
    # CUDA allows 2³¹ programs along the first axis, and 65,535 along the second.
    grid = (cu_seqlens.numel() - 1) * H, triton.cdiv(max_seqlen, block)
    sizes = [M, H, *q.stride()[:2], *k.stride()[:2]]
    sizes += [] if gradient is None else [gradient.stride(0)]
    with torch.cuda.device_of(q):
        kernel[grid](*tensors, cu_seqlens_q, cu_seqlens, *sizes, D=D, **tile._asdict(), **FUSE)


# What torch.compile must know of them: the shapes and dtypes that they give.


@fused.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen):
    M, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((H, M), dtype=torch.float32)


@fused_backward.register_fake
def _(d_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens, max_seqlen):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@fused_self.register_fake
def _(qkv, cu_seqlens, max_seqlen):
    T, _, H, D = qkv.shape
    return qkv.new_empty((T, H, D)), qkv.new_empty((H, T), dtype=torch.float32)


@fused_self_backward.register_fake
def _(d_out, qkv, out, lse, cu_seqlens, max_seqlen):
    return torch.empty_like(qkv)


# And what autograd must know: what is saved, and the gradients of the inputs.


def save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keep what `fused_backward` reads."""
    q, k, v, cu_seqlens_q, cu_seqlens, ctx.max_seqlen = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens)
    ctx.set_materialize_grads(False)  # none is needed for lse


def gradients(ctx, d_out: Tensor, d_lse: None) -> tuple[Tensor | None, ...]:
    """The gradients of the six inputs of `fused`."""
    return *fused_backward(d_out, *ctx.saved_tensors, ctx.max_seqlen), None, None, None


def save_for_self_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """The same for `fused_self`."""
    qkv, cu_seqlens, ctx.max_seqlen = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def self_gradients(ctx, d_out: Tensor, d_lse: None) -> tuple[Tensor | None, ...]:
    """The gradients of the three inputs of `fused_self`."""
    return fused_self_backward(d_out, *ctx.saved_tensors, ctx.max_seqlen), None, None


fused.register_autograd(gradients, setup_context=save_for_backward)
fused_self.register_autograd(self_gradients, setup_context=save_for_self_backward)
