"""Attention by plain products over lengths that are rounded up: for a CPU with bfloat16 products.

There oneDNN compiles a kernel for every new shape of a product, which takes 1 to 3 ms, and texts
come in all lengths: with `attention.reference` compiling was a third of a training step
(tests/benchmarks/LOG.md). Lengths that are multiples of 64 are few, and come again. So here, and
only in here, rows of zeros stand after a text, which as keys are masked and whose answers as
queries nobody reads. Neighbours that are so short that they fit into 64 rows together share them,
and there each masks the keys of the other.
"""

import functools
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MULTIPLE = 64  # of rows of keys, and of queries where these are the same tokens
FEW = 16  # multiple of rows of queries where only some tokens ask
# Numbers in the softmax of a group, if it is not of one block. More of them take more memory and
# are hardly faster, a quarter of them takes 1.2 to 1.3 times as long (tests/benchmarks/LOG.md).
PIECE = 2**22
# The softmax of a token, H·n numbers, is kept for the way back if it takes no more than eight
# hidden vectors of H·D; else it is made again, which takes a tenth of a step. With heads of 64 it
# is kept up to 512 tokens.
KEPT = 8


class Padded(torch.autograd.Function):
    """softmax(q kᵀ / √D) v for packed q (M, H, D), k and v (T, H, D).

    By hand, to keep no more than it has to: padded q, k and v, and the softmax only where it is
    small.

    Raises ValueError where the cumulative lengths do not end with M and T.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        ends = tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens.tolist())
        if (len(q), len(k)) != (ends[0][-1], ends[1][-1]):
            raise ValueError(
                f"{len(q)} queries, {len(k)} keys; lengths of {ends[0][-1]} and {ends[1][-1]}"
            )
        ctx.groups, ctx.T = plan(*ends, q.size(1), q.device), len(k)
        out, kept = q.new_empty(q.shape), []
        q, k, v = vectors(q), vectors(k), vectors(v)
        with torch.autocast(q.device.type, enabled=False):  # everything in the precision of q
            for group in ctx.groups:
                q1 = group.queries.pad(q).mul_(q.size(-1) ** -0.5)
                k1, v1 = group.keys.pad(k), group.keys.pad(v)
                weights = softmax(q1, k1, group)
                group.queries.unpad(weights @ v1, out)
                kept += [q1, k1, v1, weights if k1.size(2) <= KEPT * q.size(-1) else None]
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
                weights = softmax(q1, k1, group) if weights is None else weights
                d_out1 = group.queries.pad(d_out)
                group.keys.unpad(weights.mT @ d_out1, dv)
                d_weights = d_out1 @ v1.mT
                d_scores = torch.ops.aten._softmax_backward_data(
                    d_weights, weights, -1, weights.dtype
                )
                group.queries.unpad(d_scores @ k1, dq)
                group.keys.unpad(d_scores.mT @ q1, dk)  # q1 is scaled already
        return dq.mul_(dq.size(-1) ** -0.5), dk, dv, None, None


def softmax(q1: Tensor, k1: Tensor, group: "Group") -> Tensor:
    """The attention weights (S, H, m, n) of a group, with zeros for keys that are none of the query's."""
    scores = q1 @ k1.mT
    if group.strangers is not None:
        # A seventh of the time of masked_fill_; it hides no NaN and no ∞, but these end training
        # anyway.
        scores += group.strangers
    else:
        for own, length in zip(scores, group.keys.lengths, strict=True):
            own[..., length:] = -torch.inf
    return scores.softmax(-1)


def vectors(x: Tensor) -> Tensor:
    """A packed (T, H, D) as (T·H + H, D), the last H of them zeros. A copy: rows of q may lie 3·H·D apart."""
    return F.pad(x, (0, 0, 0, 0, 0, 1)).flatten(0, 1)


class Blocks:
    """Where rows of a packed (T, H, D) stand in S blocks (S, H, n, D): neighbours in each, then zeros.

    One index moves all vectors of D numbers at once, which is four times as fast as a copy for each
    block.
    """

    def __init__(self, rows: list[range], n: int, T: int, heads: int, device: torch.device):
        """`rows` are those of each block; the next block goes on where one ends."""
        self.shape, self.packed = (len(rows), heads, n), slice(rows[0].start, rows[-1].stop)
        self.lengths = [len(own) for own in rows]
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        first = torch.tensor([own.start for own in rows], device=device)[:, None]
        place = torch.arange(n, device=device)
        self.rows = (first + place).where(
            place < lengths, T
        )  # (S, n): which is in each place; T: none is
        head = torch.arange(heads, device=device)[:, None]
        self.source = (
            self.rows[:, None] * heads + head
        ).flatten()  # (S·H·n,) of `vectors`, for each place
        places = torch.arange(self.source.numel(), device=device).view(self.shape)
        self.target = places.transpose(1, 2)[self.rows < T].flatten()  # and back

    def pad(self, x: Tensor) -> Tensor:
        """The blocks, from the `vectors` of a packed tensor."""
        return x.index_select(0, self.source).view(*self.shape, x.size(1))

    def unpad(self, blocks: Tensor, x: Tensor) -> None:
        """Write the blocks into those rows of a packed tensor that they are for."""
        torch.index_select(
            blocks.flatten(0, 2), 0, self.target, out=x[self.packed].view(-1, x.size(2))
        )


@dataclass
class Group:
    """Neighbouring blocks of one shape; a block is a long sequence or several short ones."""

    queries: Blocks  # of m rows
    keys: Blocks  # of n rows
    # (S, 1, m, n), if sequences share a block: for each query -∞ at keys of another one or of none,
    # else 0
    strangers: Tensor | None


@functools.lru_cache(maxsize=2)  # asked in every layer of a step
def plan(
    cu_q: tuple[int, ...], cu_k: tuple[int, ...], heads: int, device: torch.device
) -> list[Group]:
    """What is computed together: neighbours of one padded length, at most PIECE scores of them."""
    blocks, first, B = [], 0, len(cu_k) - 1
    while first < B:
        last = first + 1
        while last < B and cu_k[last + 1] - cu_k[first] <= MULTIPLE:
            last += 1
        blocks.append(
            (range(cu_q[first], cu_q[last]), range(cu_k[first], cu_k[last]), last - first)
        )
        first = last
    sequence_q, sequence_k = sequence_numbers(cu_q, device), sequence_numbers(cu_k, device)
    groups = []
    for n, neighbours in groupby(blocks, lambda block: rounded_up(block[1], MULTIPLE)):
        alike = list(neighbours)
        m = n if cu_q == cu_k else max(rounded_up(rows, FEW) for rows, _, _ in alike)
        most = max(1, PIECE // max(1, heads * m * n))
        for i in range(0, len(alike), most):
            rows_q, rows_k, sequences = map(list, zip(*alike[i : i + most], strict=True))
            queries = Blocks(rows_q, m, cu_q[-1], heads, device)
            keys = queries if cu_q == cu_k else Blocks(rows_k, n, cu_k[-1], heads, device)
            strangers = None
            if max(sequences) > 1:
                of_query, of_key = sequence_q[queries.rows], sequence_k[keys.rows]
                strangers = mask(of_query[:, None, :, None], of_key[:, None, None, :])
            groups.append(Group(queries, keys, strangers))
    return groups


def rounded_up(rows: range, multiple: int) -> int:
    """Their number, up to a multiple."""
    return -(-len(rows) // multiple) * multiple


def mask(of_query: Tensor, of_key: Tensor) -> Tensor:
    """-∞ where there is a query and the key is of another sequence, or of none; else 0."""
    # A row without a query may see all keys: a softmax of nothing would be no number.
    hidden = (of_query != of_key) & (of_query > 0)
    # bfloat16 has both numbers, whatever they are added to.
    return torch.zeros_like(hidden, dtype=torch.bfloat16).masked_fill(hidden, -torch.inf)


def sequence_numbers(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """(T+1,): for each row the number of its sequence, from 1; and then 0, for what is no row."""
    lengths = torch.tensor(cu_seqlens, device=device).diff()
    numbers = torch.arange(1, len(cu_seqlens), device=device)
    return F.pad(numbers.repeat_interleave(lengths), (0, 1))
