"""Attention by plain products over lengths that are rounded up: for a CPU with bfloat16 products.

There oneDNN compiles a kernel for every new shape of a product, which takes 1 to 3 ms, and texts come in
all lengths: with `attention.reference` compiling was a third of a training step (tests/benchmarks/LOG.md).
Lengths that are multiples of 64 are few, and come again. So here, and only in
here, sequences get a few rows more. As keys these are masked, as queries nobody reads what they say.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MULTIPLE = 64
# Numbers in the softmax of a group, if it is not of one sequence. With 50 MB of them in one tensor the same
# work takes half as long again (measured without machine.keep_freed_memory, tests/benchmarks/LOG.md).
PIECE = 2**22


class Padded(torch.autograd.Function):
    """softmax(q kᵀ / √D) v for packed q, k, v (T, H, D). Keeps the softmax, as autograd would.

    By hand, since autograd's way back through the padding takes as long as is won by it.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        out, kept = torch.empty_like(q), []
        with torch.autocast(q.device.type, enabled=False):  # everything in the precision of q
            for group in _groups(cu_seqlens, q.size(1)):
                q1, k1, v1 = (group.pad(x) for x in (q, k, v))
                q1 *= q.size(-1) ** -0.5
                scores = q1 @ k1.mT  # (S, H, n, n)
                for own, length in zip(scores, group.lengths, strict=True):
                    own[..., length:] = -torch.inf
                weights = scores.softmax(-1)
                group.write(out, weights @ v1)
                kept += [q1, k1, v1, weights]
        ctx.save_for_backward(cu_seqlens, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        cu_seqlens, *kept = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(d_out) for _ in range(3))
        with torch.autocast(d_out.device.type, enabled=False):
            for i, group in enumerate(_groups(cu_seqlens, d_out.size(1))):
                q1, k1, v1, weights = kept[4 * i : 4 * i + 4]
                d_out1 = group.pad(d_out)
                group.write(dv, weights.mT @ d_out1)
                d_weights = d_out1 @ v1.mT
                d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                group.write(dq, (d_scores @ k1) * q1.size(-1) ** -0.5)
                group.write(dk, d_scores.mT @ q1)  # q1 is scaled already
        return dq, dk, dv, None


class _Group:
    """S neighbouring sequences whose lengths are rounded up to the same n."""

    def __init__(self, n: int, first_row: int, lengths: list[int]):
        self.n, self.lengths, self.first_row = n, lengths, first_row

    def _rows(self) -> Iterator[tuple[int, slice]]:
        row = self.first_row
        for i, length in enumerate(self.lengths):
            yield i, slice(row, row + length)
            row += length

    def pad(self, x: Tensor) -> Tensor:
        """A copy of their rows of a packed (T, H, D) as (S, H, n, D)."""
        padded = x.new_zeros(len(self.lengths), x.size(1), self.n, x.size(2))
        for i, rows in self._rows():
            padded[i, :, : self.lengths[i]] = x[rows].transpose(0, 1)
        return padded

    def write(self, x: Tensor, padded: Tensor) -> None:
        """Put what belongs to them, (S, H, n, D), into their rows of a packed (T, H, D)."""
        for i, rows in self._rows():
            x[rows] = padded[i, :, : self.lengths[i]].transpose(0, 1)


def _rounded_up(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def _groups(cu_seqlens: Tensor, heads: int) -> Iterator[_Group]:
    row = 0
    for n, neighbours in groupby(cu_seqlens.diff().tolist(), _rounded_up):
        alike, most = list(neighbours), max(1, PIECE // max(1, heads * n * n))
        for first in range(0, len(alike), most):
            lengths = alike[first : first + most]
            yield _Group(n, row, lengths)
            row += sum(lengths)
