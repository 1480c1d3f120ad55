"""Attention over packed sequences: one function, several ways to compute it.

A batch holds its sequences laid end to end with no padding, so the T tokens of B sequences come
with `cu_seqlens` (B+1,), the cumulative lengths: sequence b owns rows
`cu_seqlens[b]:cu_seqlens[b+1]`. Attention is the part of the model that works on them; a token
attends to the tokens of its own sequence and to nothing else (Vaswani et al. 2017, section 3.2.1,
without a causal mask, as in BERT).

    q, k, v     (T, H, D)   T tokens, H heads, D dimensions a head
    cu_seqlens  (B+1,)      int32
    returns     (T, H, D)

Read `reference` for what is computed, `Tiled` for how FlashAttention computes the same without ever
holding all scores, fast/triton_attention.py for that on a GPU, and padded_attention.py for what
suits a CPU. No backend drops attention weights at random: minitune trains without dropout there.
"""

import importlib.util
import os
from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune.fast.padded_attention import Padded
from minitune.support.errors import UserError


def reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """softmax(q kᵀ / √D) v for each sequence by itself: the definition, and the oracle of the tests."""
    q = q * q.size(-1) ** -0.5  # scaling q costs M·H·D products, scaling the scores M·H·n
    outputs = []
    for (q1,), (k1, v1) in _rectangles(cu_seqlens_q, cu_seqlens, [q], [k, v]):
        scores = q1 @ k1.mT  # (sequences, H, m, n)
        # torch sums a bfloat16 softmax in float32 inside and rounds once, at the end.
        out = torch.softmax(scores, dim=-1) @ v1  # (sequences, H, m, D)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _rectangles(
    cu_seqlens_q: Tensor, cu_seqlens: Tensor, of_queries: list[Tensor], of_keys: list[Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Neighbouring sequences with equally many queries m and keys n as one.

    They are views, (sequences, H, m, …) of tensors (M, H, …) and (sequences, H, n, …) of tensors
    (T, H, …). They share one batched product, which changes no result and is fast where batches are
    sorted by length.
    """
    sizes = zip(cu_seqlens_q.diff().tolist(), cu_seqlens.diff().tolist(), strict=True)
    alike = [(len(list(same)), m, n) for (m, n), same in groupby(sizes)]

    def views(x: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
        parts = x.split([count * length for count, length in shapes])
        return [
            part.unflatten(0, shape).transpose(1, 2)
            for part, shape in zip(parts, shapes, strict=True)
        ]

    queries = [views(x, [(count, m) for count, m, _ in alike]) for x in of_queries]
    keys = [views(x, [(count, n) for count, _, n in alike]) for x in of_keys]
    yield from zip(zip(*queries, strict=True), zip(*keys, strict=True), strict=True)


class Tiled(torch.autograd.Function):
    """FlashAttention (Dao et al. 2022) in plain torch: exact attention in memory that grows with T, not T².

    `reference` needs a whole row of scores before it can divide by the row's sum. The way out is
    the online softmax (Milakov & Gimelshein 2018). Take the keys a block at a time, and keep for
    each query

        top      the largest score so far
        total    Σ exp(score − top)  over the keys so far
        out      Σ exp(score − top) · value

    When a block brings a larger score, `total` and `out` are relative to the wrong one; multiplying
    both by exp(old top − new top) puts that right. After the last block out / total is the answer,
    and lse = top + log(total), the log of Σ exp(score), is all that the backward pass needs to know
    of the softmax: it recomputes any block of the weights as P = exp(S − lse) instead of storing
    them.

    With dO, the gradient of the output, the chain rule through S = q kᵀ, P = softmax(S), O = P v
    reads

        dv = Pᵀ dO      dP = dO vᵀ      dS = P ∘ (dP − δ)      dq = dS k      dk = dSᵀ q

    where δ = Σ_keys P ∘ dP, from the softmax's own derivative, seems to need whole rows again. But
    it equals the row sum of dO ∘ O (Dao 2023, FlashAttention-2), so block by block is enough here
    too.

    Between the passes it keeps q, k, v, the output and lse. Blocks are summed in float32 (float64
    for float64 inputs) and in a fixed order, so equal inputs give equal bits.
    """

    BLOCK = 64  # keys; the largest tensor of all is a block of scores, M·H·BLOCK

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        out, lse = torch.empty_like(q), torch.empty_like(q[..., :1], dtype=_sum_dtype(q))
        with _no_autocast(q):
            for (q1, out1, lse1), kv in _rectangles(
                cu_seqlens_q, cu_seqlens, [q, out, lse], [k, v]
            ):
                out1[:], lse1[:] = _tiled_forward(q1, *kv)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *cu_seqlens = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        with _no_autocast(q):
            for of_queries, of_keys in _rectangles(
                *cu_seqlens, [q, out, lse, d_out, dq], [k, v, dk, dv]
            ):
                *given_q, dq1 = of_queries
                *given_k, dk1, dv1 = of_keys
                dq1[:], dk1[:], dv1[:] = _tiled_backward(*given_q, *given_k)
        return dq, dk, dv, None, None


def _tiled_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output (sequences, H, m, D) and lse (sequences, H, m, 1) of one rectangle."""
    q, k, v = (x.to(_sum_dtype(x)) for x in (q, k, v))
    q = q * q.size(-1) ** -0.5
    top = q.new_full((*q.shape[:-1], 1), -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    for k1, v1 in zip(k.split(Tiled.BLOCK, -2), v.split(Tiled.BLOCK, -2), strict=True):
        scores = q @ k1.mT  # (sequences, H, m, BLOCK)
        old_top, top = top, torch.maximum(top, scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - top)
        correction = torch.exp(old_top - top)  # 0 for the first block: nothing has been summed yet
        total = correction * total + weights.sum(-1, keepdim=True)
        out = correction * out + weights @ v1
    return out / total, top + total.log()


def _tiled_backward(
    q: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of one rectangle's q (sequences, H, m, D), k and v (sequences, H, n, D)."""
    q, k, v, out, d_out = (x.to(lse.dtype) for x in (q, k, v, out, d_out))
    scale = q.size(-1) ** -0.5
    q = q * scale
    delta = (d_out * out).sum(-1, keepdim=True)  # (sequences, H, m, 1)
    dq, dk, dv = torch.zeros_like(q), [], []
    for k1, v1 in zip(k.split(Tiled.BLOCK, -2), v.split(Tiled.BLOCK, -2), strict=True):
        weights = torch.exp(q @ k1.mT - lse)  # (sequences, H, m, BLOCK)
        d_scores = weights * (d_out @ v1.mT - delta)
        dq += d_scores @ k1
        dk.append(d_scores.mT @ q)
        dv.append(weights.mT @ d_out)
    return scale * dq, torch.cat(dk, -2), torch.cat(dv, -2)


def _sum_dtype(x: Tensor) -> torch.dtype:
    """What sums over x are kept in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _no_autocast(x: Tensor) -> torch.autocast:
    """Products of float32 tensors stay float32 in here."""
    return torch.autocast(x.device.type, enabled=False)


def tiled(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """FlashAttention in plain torch, to be read."""
    return Tiled.apply(q, k, v, cu_seqlens_q, cu_seqlens)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """torch's own fused attention. It wants rectangles, and gets them without any padding."""
    outputs = []
    for (q1,), (k1, v1) in _rectangles(cu_seqlens_q, cu_seqlens, [q], [k, v]):
        out = F.scaled_dot_product_attention(q1, k1, v1)  # (sequences, H, m, D)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def fused(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """FlashAttention as Triton kernels. Imported only when asked for: not every machine has triton."""
    from minitune.fast.triton_attention import Fused

    return Fused.apply(q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen)


def padded(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """Products of few different shapes, to learn; torch's kernel, whose forward pass is faster, to read."""
    if torch.is_grad_enabled() and q.requires_grad:
        return Padded.apply(q, k, v, cu_seqlens_q, cu_seqlens)
    return sdpa(q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen)


BACKENDS = {"reference": reference, "padded": padded, "tiled": tiled, "sdpa": sdpa, "triton": fused}


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The backend that "auto" stands for; any other name is returned as it is.

    Measured on CPUs with bfloat16 products (tests/benchmarks/LOG.md): in bfloat16 plain batched
    products are about twice as fast as torch's fused kernel and its backward pass, where their
    shapes come again; in float32 the fused kernel is ahead. On a GPU the Triton kernels where they
    run, since one call serves sequences of all lengths.

    Raises UserError where "triton" is asked for by name and cannot run.
    """
    if backend == "triton" and (obstacle := obstacle_to_triton(device, head_size)):
        raise UserError(f"--attention triton: {obstacle}")
    if backend != "auto":
        return backend
    if device.type == "cuda":
        return "sdpa" if obstacle_to_triton(device, head_size) else "triton"
    return "padded" if dtype == torch.bfloat16 else "sdpa"


def obstacle_to_triton(device: torch.device, head_size: int) -> str:
    """Why the kernels of fast/triton_attention.py cannot run here; empty if they can."""
    if (
        device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1"
    ):  # which runs kernels in numpy
        return "it needs a CUDA device"
    if not importlib.util.find_spec("triton"):
        return "the package triton is not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"  # what triton itself supports
    if head_size not in (32, 64, 128):
        return f"it needs heads of 32, 64 or 128, and the model's have {head_size}"
    return ""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str = "sdpa",
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    """Attend within each sequence of a packed batch. Shapes as at the top of this file.

    Raises KeyError for a backend that does not exist; for "auto", see `resolve_backend`.
    """
    cu_seqlens_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    return BACKENDS[backend](q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen)
