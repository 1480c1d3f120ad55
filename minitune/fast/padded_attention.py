"""Attention by plain matrix multiplications over padded lengths, for a CPU that has bfloat16.

There oneDNN compiles a kernel for every new shape of a multiplication, in 1 to 3 ms, and texts come
in all lengths: compiling was a third of a training step. Lengths that are multiples of 64 are few,
and come again. So here, and only here, rows of zeros stand after a text; a bias hides them as keys,
and as queries their outputs are not read. Neighbours so short that they fit into 64 rows together
share them, and the bias hides the keys of each from the other.
"""

import functools
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

KEY_MULTIPLE = 64  # of rows of keys, and of queries where these are the same tokens
QUERY_MULTIPLE = 16  # of rows of queries where only some tokens are queries
GROUP_SCORES = 2**22  # of several blocks at most; a quarter takes 1.2 to 1.3 times as long
# The softmax of a token, H·n numbers, is kept for the backward pass if it takes no more than so
# many hidden vectors of H·D (with heads of 64: up to 512 tokens). Else it is recomputed.
KEPT_VECTORS = 8

Lengths = tuple[int, ...]  # cumulative, starting with 0


class Padded(torch.autograd.Function):
    """softmax(q kᵀ / √D) v for packed q (M, H, D), k and v (T, H, D).

    It keeps padded q, k and v, and the softmax only where it is small.

    Raises ValueError where the cumulative lengths do not end with M and T.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        cu_q, cu_k = tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens.tolist())
        if (len(q), len(k)) != (cu_q[-1], cu_k[-1]):
            raise ValueError(f"{len(q)} queries, {len(k)} keys; lengths of {cu_q[-1]}, {cu_k[-1]}")
        ctx.groups, ctx.T = plan(cu_q, cu_k, q.size(1), q.device), len(k)
        out, kept = q.new_empty(q.shape), []
        q, k, v = vectors(q), vectors(k), vectors(v)
        with torch.autocast(q.device.type, enabled=False):  # everything in the precision of q
            for group in ctx.groups:
                q1 = group.queries.pad(q).mul_(q.size(-1) ** -0.5)
                k1, v1 = group.keys.pad(k), group.keys.pad(v)
                weights = group.softmax(q1, k1)
                group.queries.unpad(weights @ v1, out)
                kept += [q1, k1, v1, weights if k1.size(2) <= KEPT_VECTORS * q.size(-1) else None]
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        dq = d_out.new_empty(d_out.shape)
        dk, dv = (d_out.new_empty(ctx.T, *d_out.shape[1:]) for _ in range(2))
        d_out = vectors(d_out)
        with torch.autocast(d_out.device.type, enabled=False):
            for i, group in enumerate(ctx.groups):
                q1, k1, v1, weights = kept[4 * i : 4 * i + 4]
                weights = group.softmax(q1, k1) if weights is None else weights
                d_out1 = group.queries.pad(d_out)
                group.keys.unpad(weights.mT @ d_out1, dv)
                d_scores = torch.ops.aten._softmax_backward_data(
                    d_out1 @ v1.mT, weights, -1, weights.dtype
                )
                group.queries.unpad(d_scores @ k1, dq)
                group.keys.unpad(d_scores.mT @ q1, dk)  # q1 is scaled already
        return dq.mul_(dq.size(-1) ** -0.5), dk, dv, None, None


def vectors(x: Tensor) -> Tensor:
    """A packed (T, H, D), whose rows may lie apart, as (T·H + H, D) with the last H rows zeros."""
    return F.pad(x, (0, 0, 0, 0, 0, 1)).flatten(0, 1)


class Blocks:
    """Where rows of a packed (T, H, D) stand in S blocks (S, H, n, D): neighbours, then zeros.

    One gather index moves all vectors of D numbers at once, which is four times as fast as a copy
    for each block.
    """

    def __init__(
        self, cu: Lengths, blocks: list[tuple[int, int]], n: int, heads: int, device: torch.device
    ):
        """`blocks` are neighbours: of each the first sequence, and the one after the last."""
        starts, ends = ([cu[i] for i in sequences] for sequences in zip(*blocks, strict=True))
        self.shape, self.packed = (len(blocks), heads, n), slice(starts[0], ends[-1])
        self.lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        start, end, cu = (torch.tensor(x, device=device) for x in (starts, ends, cu))
        row = start[:, None] + torch.arange(n, device=device)
        row = row.where(row < end[:, None], cu[-1])  # (S, n): the row that stands here; T for none
        self.sequence = torch.bucketize(row, cu[1:], right=True)  # (S, n): that row's; B for none
        self.is_row = row < cu[-1]
        head = torch.arange(heads, device=device)[:, None]
        self.gather = (row[:, None] * heads + head).flatten()  # (S·H·n,), into `vectors`
        places = torch.arange(self.gather.numel(), device=device).view(self.shape)
        self.scatter = places.transpose(1, 2)[self.is_row].flatten()  # and back

    def pad(self, x: Tensor) -> Tensor:
        """The blocks, from the `vectors` of a packed tensor."""
        return x.index_select(0, self.gather).view(*self.shape, x.size(1))

    def unpad(self, blocks: Tensor, x: Tensor) -> None:
        """Write the blocks into those rows of a packed tensor that they are for."""
        out = x[self.packed].view(-1, x.size(2))
        torch.index_select(blocks.flatten(0, 2), 0, self.scatter, out=out)


@dataclass
class Group:
    """Neighbouring blocks of one shape; a block is a long sequence or several short ones."""

    queries: Blocks  # of m rows
    keys: Blocks  # of n rows
    bias: Tensor | None  # (S, 1, m, n) attention bias, 0 or -∞, where sequences share a block

    def softmax(self, q1: Tensor, k1: Tensor) -> Tensor:
        """Attention weights (S, H, m, n), zero for keys that are not of the query's sequence."""
        scores = q1 @ k1.mT
        if self.bias is not None:
            scores += self.bias  # a seventh of the time of masked_fill_
        else:
            for block, length in zip(scores, self.keys.lengths, strict=True):
                block[..., length:] = -torch.inf
        return scores.softmax(-1)


@functools.lru_cache(maxsize=2)  # called in every layer of a step
def plan(cu_q: Lengths, cu_k: Lengths, heads: int, device: torch.device) -> list[Group]:
    """What is computed together: neighbours of one padded length, at most GROUP_SCORES scores."""
    blocks, first, B = [], 0, len(cu_k) - 1
    while first < B:
        last = first + 1
        while last < B and cu_k[last + 1] - cu_k[first] <= KEY_MULTIPLE:
            last += 1
        blocks.append((first, last))
        first = last

    def padded_length(cu: Lengths, block: tuple[int, int], multiple: int) -> int:
        return -(-(cu[block[1]] - cu[block[0]]) // multiple) * multiple

    groups = []
    for n, alike in groupby(blocks, lambda block: padded_length(cu_k, block, KEY_MULTIPLE)):
        alike = list(alike)
        m = n if cu_q == cu_k else max(padded_length(cu_q, x, QUERY_MULTIPLE) for x in alike)
        most = max(1, GROUP_SCORES // max(1, heads * m * n))
        for i in range(0, len(alike), most):
            some = alike[i : i + most]
            keys = Blocks(cu_k, some, n, heads, device)
            queries = keys if cu_q == cu_k else Blocks(cu_q, some, m, heads, device)
            shared = any(last - first > 1 for first, last in some)
            groups.append(Group(queries, keys, attention_bias(queries, keys) if shared else None))
    return groups


def attention_bias(queries: Blocks, keys: Blocks) -> Tensor:
    """(S, 1, m, n): -∞ where a query meets a key of another sequence or of none, else 0."""
    hidden = queries.sequence[:, None, :, None] != keys.sequence[:, None, None, :]
    # A row without a query may see all keys: a softmax of nothing would be no number.
    hidden &= queries.is_row[:, None, :, None]
    # bfloat16 has both numbers, whatever they are added to.
    return torch.zeros_like(hidden, dtype=torch.bfloat16).masked_fill(hidden, -torch.inf)
