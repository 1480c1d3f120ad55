"""Self-attention over packed sequences: one function, several ways to compute it.

In a packed batch the T tokens of B sequences are laid end to end, and `cu_seqlens` (B+1,) has the
cumulative lengths: sequence b is the rows `cu_seqlens[b]:cu_seqlens[b+1]`. Attention is the only
part of the model that needs them. A token attends to all tokens of its sequence and to no others
(Vaswani et al. 2017, section 3.2.1; without a causal mask, as in BERT).

    q             (M, H, D)   M queries (all T tokens or some of them), H heads of D dimensions
    k, v          (T, H, D)
    cu_seqlens_q  (B+1,)      int32, the cumulative numbers of queries
    cu_seqlens    (B+1,)      int32
    max_seqlen                the length of the longest sequence
    returns       (M, H, D)

Read `one_sequence` for what is computed, and `Tiled` for how FlashAttention computes the same
without holding all scores at once. fast/triton_attention.py does that on a GPU, and
fast/padded_attention.py is fast on a CPU. There is no dropout of attention weights.
"""

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune.fast.layers import equal_lengths
from minitune.fast.padded_attention import Padded
from minitune.support.errors import UserError


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) (H, m, n): how much each query takes of each value."""
    scores = torch.einsum("mhd,nhd->hmn", q, k) / q.size(-1) ** 0.5
    return scores.softmax(-1)


def one_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v, the definition: q (m, H, D), k and v (n, H, D) to (m, H, D)."""
    return torch.einsum("hmn,nhd->mhd", attention_weights(q, k), v)


def reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The definition for a packed batch: one sequence after another."""
    counts, lengths = cu_seqlens_q.diff().tolist(), cu_seqlens.diff().tolist()
    sequences = zip(q.split(counts), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([one_sequence(*qkv) for qkv in sequences])


class Tiled(torch.autograd.Function):
    """FlashAttention (Dao et al. 2022) in plain torch: exact, in memory that grows with T, not T².

    `one_sequence` needs a whole row of scores before it can divide by the sum of the row. The
    online softmax (Milakov & Gimelshein 2018) does not. It takes the keys a block at a time and
    keeps for each query

        top      the largest score so far
        total    Σ exp(score − top)  over the keys so far
        out      Σ exp(score − top) · value

    If a block has a larger score, then `total` and `out` were computed with the wrong `top`, which
    multiplying both by exp(old top − new top) corrects. After the last block the result is out /
    total. The backward pass needs only lse = top + log(total), the log of Σ exp(score): from it any
    block of weights can be recomputed as P = exp(S − lse), so that no weights are stored.

    Let dO be the gradient of the output, and ∘ multiply element by element. The chain rule for
    S = q kᵀ (with q already divided by √D), P = softmax(S), O = P v gives

        dv = Pᵀ dO      dP = dO vᵀ      dS = P ∘ (dP − δ)      dq = dS k      dk = dSᵀ q

    where δ = Σ_keys P ∘ dP comes from the derivative of the softmax. It is a sum over a whole row,
    but it equals the row sum of dO ∘ O (Dao 2023, FlashAttention-2), which is known beforehand.

    Kept for the backward pass are q, k, v, the output and lse. Sums are in float32 (float64 for
    float64 inputs) and in a fixed order, so that equal inputs give equal bits.
    """

    KEY_BLOCK = 64  # keys in a block; the largest tensor has M·H·KEY_BLOCK scores

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        out = torch.empty_like(q)
        lse = torch.empty_like(q[..., :1], dtype=torch.promote_types(q.dtype, torch.float32))
        with torch.autocast(q.device.type, enabled=False):  # float32 stays float32 in here
            # Sequences of equal length are one batch, as views (sequences, H, length, D).
            for q1, out1, lse1, k1, v1 in equal_lengths(
                cu_seqlens_q, cu_seqlens, [q, out, lse], [k, v]
            ):
                # These are views: what is written to them is written to `out` and `lse`.
                out1[:], lse1[:] = _tiled_forward(*(x.to(lse.dtype) for x in (q1, k1, v1)))
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *cu_seqlens = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            for q1, out1, lse1, d_out1, dq1, k1, v1, dk1, dv1 in equal_lengths(
                *cu_seqlens, [q, out, lse, d_out, dq], [k, v, dk, dv]
            ):
                given = (x.to(lse.dtype) for x in (q1, out1, lse1, d_out1, k1, v1))
                dq1[:], dk1[:], dv1[:] = _tiled_backward(*given)
        return dq, dk, dv, None, None


def _tiled_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output (sequences, H, m, D) and lse (sequences, H, m, 1) of q, k and v."""
    q = q * q.size(-1) ** -0.5
    top = q.new_full((*q.shape[:-1], 1), -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    for k1, v1 in zip(k.split(Tiled.KEY_BLOCK, -2), v.split(Tiled.KEY_BLOCK, -2), strict=True):
        scores = q @ k1.mT  # (sequences, H, m, KEY_BLOCK)
        old_top, top = top, torch.maximum(top, scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - top)
        correction = torch.exp(old_top - top)  # 0 for the first block
        total = correction * total + weights.sum(-1, keepdim=True)
        out = correction * out + weights @ v1
    return out / total, top + total.log()


def _tiled_backward(
    q: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q (sequences, H, m, D), k and v (sequences, H, n, D)."""
    scale = q.size(-1) ** -0.5
    q = q * scale
    delta = (d_out * out).sum(-1, keepdim=True)  # (sequences, H, m, 1)
    dq, dk, dv = torch.zeros_like(q), [], []
    for k1, v1 in zip(k.split(Tiled.KEY_BLOCK, -2), v.split(Tiled.KEY_BLOCK, -2), strict=True):
        weights = torch.exp(q @ k1.mT - lse)  # (sequences, H, m, KEY_BLOCK)
        d_scores = weights * (d_out @ v1.mT - delta)
        dq += d_scores @ k1
        dk.append(d_scores.mT @ q)
        dv.append(weights.mT @ d_out)
    return scale * dq, torch.cat(dk, -2), torch.cat(dv, -2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor) -> Tensor:
    """torch's fused attention, one call for neighbouring sequences of equal length."""
    outputs = []
    for q1, k1, v1 in equal_lengths(cu_seqlens_q, cu_seqlens, [q], [k, v]):
        out = F.scaled_dot_product_attention(q1, k1, v1)  # (sequences, H, m, D)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def padded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Padded to few different shapes in training (fast/padded_attention.py); else sdpa."""
    if torch.is_grad_enabled() and q.requires_grad:
        return Padded.apply(q, k, v, cu_seqlens_q, cu_seqlens)
    return sdpa(q, k, v, cu_seqlens_q, cu_seqlens)


ON_ANY_DEVICE = {"reference": reference, "padded": padded, "tiled": Tiled.apply, "sdpa": sdpa}
BACKENDS = [*ON_ANY_DEVICE, "triton"]


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The name of the backend; "auto" is replaced by a fast one. UserError if triton cannot run.

    On CPUs with fast bfloat16 plain matrix multiplications of few shapes take half the time of
    torch's fused kernel, while in float32 the fused kernel is faster (tests/benchmarks/LOG.md). On
    a GPU one call of the Triton kernels is enough for sequences of all lengths.
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
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":  # run them in numpy
        return "it needs a CUDA device"
    if not importlib.util.find_spec("triton"):
        return "the package triton is not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"  # as triton itself
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
    """Attention within each sequence of a packed batch. The shapes are at the top of this file.

    Without `cu_seqlens_q` all tokens are queries. Raises KeyError for an unknown backend.
    """
    cu_seqlens_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    if backend == "triton":  # imported here: not every machine has the package
        from minitune.fast.fused_attention import fused

        out, _ = fused(q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen)
        return out
    return ON_ANY_DEVICE[backend](q, k, v, cu_seqlens_q, cu_seqlens)


def self_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str) -> Tensor:
    """Attention where all tokens are queries, for q, k and v in one tensor (T, 3, H, D).

    Its gradient then is one tensor, too, and three need not be copied into one.
    """
    if backend == "triton":
        from minitune.fast.fused_attention import fused_self

        out, _ = fused_self(qkv.contiguous(), cu_seqlens, max_seqlen)
        return out
    return attention(*qkv.unbind(1), cu_seqlens, max_seqlen, backend)


if __name__ == "__main__":
    from minitune.commands import demos

    demos.run(demos.show_attention)
