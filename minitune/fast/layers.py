"""Faster versions of simple operations on a CPU, with the same results."""

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

ROW_MULTIPLE = 64


def pad_rows(x: Tensor) -> Tensor:
    """Append rows of zeros to (N, …), on a CPU only; the result has a multiple of 64 rows.

    From 1,024 rows on it is a multiple of a higher power of two. There are fewer than 64 new rows,
    or at most N / 8.

    The matrices of a network then have few different numbers of rows. On a CPU with bfloat16
    arithmetic oneDNN compiles a kernel for each number, which took a tenth of all training.
    """
    if x.device.type != "cpu":
        return x
    N = x.size(0)
    multiple = max(ROW_MULTIPLE, 2 ** (N.bit_length() - 4))
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, -N % multiple))


def gelu_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """linear(gelu(x)), where gelu(x) is not kept for the backward pass but recomputed there.

    A layer then keeps an eighth less memory, for one more GELU (checkpointing, Chen et al. 2016).
    `linear` may be any module. In a compiled layer the compiler chooses what is recomputed.
    """
    y = F.gelu(x)
    if torch.compiler.is_compiling():
        return linear(y)
    place = y.data_ptr(), y.shape  # to recognise y without a reference, which would keep it

    def pack(kept: Tensor) -> Tensor | None:
        return None if (kept.data_ptr(), kept.shape) == place else kept

    def unpack(kept: Tensor | None) -> Tensor:
        return F.gelu(x.detach()) if kept is None else kept

    with saved_tensors_hooks(pack, unpack):
        return linear(y)


class ByteDropout(nn.Dropout):
    """nn.Dropout, which on a CPU draws one random byte for each number, not a float.

    That takes a quarter of the time. `p` is rounded to a multiple of 1/256.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or x.device.type != "cpu":
            return super().forward(x)
        drop = min(max(round(256 * self.p), 1), 255)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64)
        words.random_(-(2**63), None)  # all 64 bits
        noise = words.view(torch.uint8)[: x.numel()].view(x.shape)
        # Bytes of 0 and 1, which autograd keeps. Bools from a comparison take three times as long.
        kept = noise.clamp_(drop - 1, drop).sub_(drop - 1)
        return (x * kept).mul_(256 / (256 - drop))


def equal_lengths(
    cu_seqlens_q: Tensor, cu_seqlens: Tensor, of_queries: list[Tensor], of_keys: list[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Group neighbouring sequences that have equally many queries m and equally many keys n.

    For each group it yields views: (sequences, H, m, …) of each tensor (M, H, …) in `of_queries`,
    then (sequences, H, n, …) of each tensor (T, H, …) in `of_keys`. Attention then takes one call
    for each group, and groups are large where sequences are sorted by length.
    """
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens.diff().tolist(), strict=True)
    runs = [(len(list(run)), m, n) for (m, n), run in groupby(lengths)]

    def views(x: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
        parts = x.split([count * length for count, length in shapes])
        return [y.unflatten(0, s).transpose(1, 2) for y, s in zip(parts, shapes, strict=True)]

    queries = [views(x, [(count, m) for count, m, _ in runs]) for x in of_queries]
    keys = [views(x, [(count, n) for count, _, n in runs]) for x in of_keys]
    return zip(*queries, *keys, strict=True)
