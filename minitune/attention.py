"""Attention over packed sequences: one function, several ways to compute it.

A batch holds its sequences laid end to end with no padding, so the T tokens of B sequences come with
`cu_seqlens` (B+1,), the cumulative lengths: sequence b owns rows `cu_seqlens[b]:cu_seqlens[b+1]`.
Attention is the part of the model that works on them; a token attends to the tokens of its own
sequence and to nothing else (Vaswani et al. 2017, section 3.2.1, without a causal mask, as in BERT).

    q, k, v     (T, H, D)   T tokens, H heads, D dimensions a head
    cu_seqlens  (B+1,)      int32
    returns     (T, H, D)
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """softmax(q kᵀ / √D) v for each sequence by itself: the definition, and the oracle of the tests.

    Neighbouring sequences of equal length share one batched product, which changes no result and
    makes this fast where batches are sorted by length.
    """
    q = q * q.size(-1) ** -0.5  # scaling q costs T·H·D products, scaling the scores T·H·n
    runs = _runs_of_equal_length(cu_seqlens)
    outputs = []
    rows = [count * length for length, count in runs]
    for (length, count), *qkv in zip(runs, q.split(rows), k.split(rows), v.split(rows), strict=True):
        qb, kb, vb = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        scores = qb @ kb.mT  # (count, H, length, length)
        # torch sums a bfloat16 softmax in float32 inside and rounds once, at the end.
        out = torch.softmax(scores, dim=-1) @ vb  # (count, H, length, D)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """torch's own fused attention, which wants rectangles: pad here, and only here, where lengths differ."""
    (T, H, D), B, n = q.shape, cu_seqlens.numel() - 1, max_seqlen
    if T == B * n:  # equal lengths: the packed batch is a rectangle already
        q, k, v = (x.view(B, n, H, D).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(T, H, D)
    lengths = cu_seqlens.diff()
    real = torch.arange(n, device=q.device) < lengths[:, None]  # (B, n): False at padding
    padded = [x.new_zeros(B, n, H, D).masked_scatter(real[..., None, None], x) for x in (q, k, v)]
    q, k, v = (x.transpose(1, 2) for x in padded)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
    return out.transpose(1, 2)[real]


def _runs_of_equal_length(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """(length, how many sequences in a row have it), in order."""
    lengths, counts = torch.unique_consecutive(cu_seqlens.diff(), return_counts=True)
    return list(zip(lengths.tolist(), counts.tolist(), strict=True))


BACKENDS = {"reference": reference, "sdpa": sdpa}


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that "auto" stands for; any other name is returned as it is.

    Measured on two CPU cores with AVX-512 BF16 (tests/benchmarks/LOG.md): in bfloat16 plain batched
    products are about twice as fast as torch's fused kernel, in float32 the fused kernel is ahead.
    """
    if backend != "auto":
        return backend
    return "reference" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str = "auto"
) -> Tensor:
    """Attend within each sequence of a packed batch. Shapes as at the top of this file.

    Raises KeyError for a backend that does not exist.
    """
    return BACKENDS[choose(backend, q.device, q.dtype)](q, k, v, cu_seqlens, max_seqlen)
