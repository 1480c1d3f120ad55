"""Attention by plain matrix multiplications over padded lengths, for a CPU that has bfloat16.

There oneDNN compiles a kernel for every new shape of a multiplication, in 1 to 3 ms. Texts have all
lengths, and so a third of a training step was compiling. There are only a few multiples of 64, so
here, and only here, sequences are padded with rows of zeros to such a length. An attention bias
hides these rows as keys, and their outputs as queries are not read. Short neighbours that fit into
64 rows together share them, and the bias hides the keys of each from the others.
"""

import functools
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

KEY_MULTIPLE = 64  # keys are padded to a multiple of this, and queries if they are all tokens
QUERY_MULTIPLE = 16  # queries are padded to a multiple of this if they are some of the tokens
GROUP_SCORES = 2**22  # in one multiplication at most; a quarter of it takes 1.2 times as long
# The attention weights of a token, H·n numbers, are kept for the backward pass if they are no more
# than 8 vectors of H·D numbers (with heads of 64: up to 512 tokens). Else they are recomputed.
KEPT_VECTORS = 8

Lengths = tuple[int, ...]  # cumulative, starting with 0


class Padded(torch.autograd.Function):
    """softmax(q kᵀ / √D) v for packed q (M, H, D), k and v (T, H, D).

    It keeps padded q, k and v for the backward pass, and the softmax if it is small. Raises
    ValueError if the cumulative lengths do not end with M and T.
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
    """A packed (T, H, D) as (T·H + H, D), a row for each token and head; the last H are zeros."""
    return F.pad(x, (0, 0, 0, 0, 0, 1)).flatten(0, 1)


class Blocks:
    """How a packed (T, H, D) is copied to S padded blocks (S, H, n, D), and back.

    A block has the rows of one or more neighbouring sequences, and then zeros. One index for all
    blocks is four times as fast as a copy for each of them.
    """

    def __init__(
        self, cu: Lengths, blocks: list[tuple[int, int]], n: int, heads: int, device: torch.device
    ):
        """`blocks` are neighbours: (first sequence, sequence after the last) of each."""
        starts, ends = ([cu[i] for i in sequences] for sequences in zip(*blocks, strict=True))
        self.shape, self.packed = (len(blocks), heads, n), slice(starts[0], ends[-1])
        self.lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        start, end, cu = (torch.tensor(x, device=device) for x in (starts, ends, cu))
        row = start[:, None] + torch.arange(n, device=device)
        row = row.where(row < end[:, None], cu[-1])  # (S, n): the packed row; T where there is none
        self.sequence = torch.bucketize(row, cu[1:], right=True)  # (S, n): of that row; B for none
        self.is_row = row < cu[-1]
        head = torch.arange(heads, device=device)[:, None]
        self.gather = (row[:, None] * heads + head).flatten()  # (S·H·n,), into `vectors`
        places = torch.arange(self.gather.numel(), device=device).view(self.shape)
        self.scatter = places.transpose(1, 2)[self.is_row].flatten()  # from the blocks to `packed`

    def pad(self, x: Tensor) -> Tensor:
        """The blocks (S, H, n, D), from the `vectors` of a packed tensor."""
        return x.index_select(0, self.gather).view(*self.shape, x.size(1))

    def unpad(self, blocks: Tensor, x: Tensor) -> None:
        """Write the blocks to their rows of a packed tensor (T, H, D)."""
        out = x[self.packed].view(-1, x.size(2))
        torch.index_select(blocks.flatten(0, 2), 0, self.scatter, out=out)


@dataclass
class Group:
    """Neighbouring blocks of the same shape, which are computed together."""

    queries: Blocks  # of m rows
    keys: Blocks  # of n rows
    bias: Tensor | None  # (S, 1, m, n) attention bias of 0 or -∞, if sequences share a block

    def softmax(self, q1: Tensor, k1: Tensor) -> Tensor:
        """The attention weights (S, H, m, n); they are zero for keys of other sequences."""
        scores = q1 @ k1.mT
        if self.bias is not None:
            scores += self.bias  # takes a seventh of the time of masked_fill_
        else:
            for block, length in zip(scores, self.keys.lengths, strict=True):
                block[..., length:] = -torch.inf
        return scores.softmax(-1)


@functools.lru_cache(maxsize=2)  # it is called in every layer of a step
def plan(cu_q: Lengths, cu_k: Lengths, heads: int, device: torch.device) -> list[Group]:
    """The groups of a batch: neighbours of the same padded length, at most GROUP_SCORES scores."""
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
    # A row that is no query may see all keys: a softmax over no key would be NaN.
    hidden &= queries.is_row[:, None, :, None]
    # bfloat16 can represent both numbers.
    return torch.zeros_like(hidden, dtype=torch.bfloat16).masked_fill(hidden, -torch.inf)
