"""Attention by plain products over lengths that are rounded up: for a CPU with bfloat16 products.

There oneDNN compiles a kernel for every new shape of a product, which takes 1 to 3 ms, and texts come in
all lengths: with `attention.reference` compiling was a third of a training step (tests/benchmarks/LOG.md).
Lengths that are multiples of 64 are few, and come again. So here, and only in here, texts get a few rows
more, which as keys are masked and whose answers as queries nobody reads. Neighbours that are so short that
they fit into 64 rows together share them, and there each masks the keys of the other.
"""

import functools
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MULTIPLE = 64  # of rows of keys, and of queries where these are the same tokens
FEW = 16  # multiple of rows of queries where only some tokens ask
# Numbers in the softmax of a group, if it is not of one block. With 50 MB of them in one tensor the same
# work takes half as long again (measured without machine.keep_freed_memory, tests/benchmarks/LOG.md).
PIECE = 2**22
# The softmax of a token, H·n numbers, is kept for the way back if it takes no more than eight hidden vectors
# of H·D; else it is made again, which takes a tenth of a step. With heads of 64 it is kept up to 512 tokens.
KEPT = 8


class Padded(torch.autograd.Function):
    """softmax(q kᵀ / √D) v for packed q (M, H, D), k and v (T, H, D).

    By hand, since autograd's way back through the padding takes as long as is won by it.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.groups = plan(tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens.tolist()), q.size(1), q.device)
        ctx.keys = len(k)
        out, kept = torch.empty_like(q), []
        with torch.autocast(q.device.type, enabled=False):  # everything in the precision of q
            for group in ctx.groups:
                q1 = pad(q, group.queries, group.m).mul_(q.size(-1) ** -0.5)
                k1, v1 = pad(k, group.keys, group.n), pad(v, group.keys, group.n)
                weights = softmax(q1, k1, group)
                unpad(weights @ v1, group.queries, out)
                kept += [q1, k1, v1, weights if group.n <= KEPT * q.size(-1) else None]
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        dq = torch.empty_like(d_out)
        dk, dv = (d_out.new_empty(ctx.keys, *d_out.shape[1:]) for _ in range(2))
        with torch.autocast(d_out.device.type, enabled=False):
            for i, group in enumerate(ctx.groups):
                q1, k1, v1, weights = kept[4 * i : 4 * i + 4]
                weights = softmax(q1, k1, group) if weights is None else weights
                d_out1 = pad(d_out, group.queries, group.m)
                unpad(weights.mT @ d_out1, group.keys, dv)
                d_weights = d_out1 @ v1.mT
                d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                unpad((d_scores @ k1) * q1.size(-1) ** -0.5, group.queries, dq)
                unpad(d_scores.mT @ q1, group.keys, dk)  # q1 is scaled already
        return dq, dk, dv, None, None


def softmax(q1: Tensor, k1: Tensor, group: "Group") -> Tensor:
    """The attention weights (S, H, m, n) of a group, with zeros for keys that are none of the query's."""
    scores = q1 @ k1.mT
    for own, rows in zip(scores, group.keys, strict=True):
        own[..., rows.stop - rows.start :] = -torch.inf
    if group.strangers is not None:
        scores.masked_fill_(group.strangers, -torch.inf)
    return scores.softmax(-1)


def pad(x: Tensor, blocks: list[slice], n: int) -> Tensor:
    """A copy of these rows of a packed (T, H, D) as (S, H, n, D), a block each, with zeros after them."""
    padded = x.new_zeros(len(blocks), x.size(1), n, x.size(2))
    for block, rows in zip(padded, blocks, strict=True):
        block[:, : rows.stop - rows.start] = x[rows].transpose(0, 1)
    return padded


def unpad(padded: Tensor, blocks: list[slice], x: Tensor) -> None:
    """Write blocks (S, H, n, D) into the rows of a packed (T, H, D) that `pad` would take them from."""
    for block, rows in zip(padded, blocks, strict=True):
        x[rows] = block[:, : rows.stop - rows.start].transpose(0, 1)


@dataclass
class Group:
    """S neighbouring blocks of one shape; a block is a long sequence or several short ones."""

    m: int  # rows of queries that a block gets
    n: int  # rows of keys
    queries: list[slice]  # the packed rows that belong to each block
    keys: list[slice]
    strangers: Tensor | None  # (S, 1, m, n) bool: keys of another sequence than the query's, if there are any


@functools.lru_cache(maxsize=2)  # asked in every layer of a step
def plan(cu_q: tuple[int, ...], cu_k: tuple[int, ...], heads: int, device: torch.device) -> list[Group]:
    """What is computed together."""
    blocks, first, B = [], 0, len(cu_k) - 1
    while first < B:
        last = first + 1
        while last < B and cu_k[last + 1] - cu_k[first] <= MULTIPLE:
            last += 1
        blocks.append((slice(cu_q[first], cu_q[last]), slice(cu_k[first], cu_k[last]), last - first))
        first = last
    owner_q, owner_k = sequence_numbers(cu_q, device), sequence_numbers(cu_k, device)
    groups = []
    for n, neighbours in groupby(blocks, lambda block: rounded_up(block[1], MULTIPLE)):
        alike = list(neighbours)
        m = n if cu_q == cu_k else max(rounded_up(rows, FEW) for rows, _, _ in alike)
        most = max(1, PIECE // max(1, heads * m * n))
        for i in range(0, len(alike), most):
            queries, keys, sequences = map(list, zip(*alike[i : i + most], strict=True))
            strangers = None
            if max(sequences) > 1:
                of_query, of_key = pad(owner_q, queries, m), pad(owner_k, keys, n)
                # A row without a query may see all keys: a softmax of nothing would be no number.
                strangers = (of_query != of_key.mT) & (of_query > 0)
            groups.append(Group(m, n, queries, keys, strangers))
    return groups


def rounded_up(rows: slice, multiple: int) -> int:
    """Their number, up to a multiple."""
    return -(-(rows.stop - rows.start) // multiple) * multiple


def sequence_numbers(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """(T, 1, 1): for each row the number of its sequence, from 1."""
    lengths = torch.tensor(cu_seqlens, device=device).diff()
    numbers = torch.arange(1, len(cu_seqlens), device=device)
    return numbers.repeat_interleave(lengths).view(-1, 1, 1)
