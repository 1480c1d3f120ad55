"""What makes layers fast on a CPU and changes no result."""

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

ROW_MULTIPLE = 64


def pad_rows(x: Tensor) -> Tensor:
    """(N, …) and rows of zeros, up to a multiple of 64, or of a higher power of two for large N.

    They are at most an eighth of N, or fewer than 64; on another device than a CPU there are none.

    The matrices of a network then have few different numbers of rows. On a CPU with bfloat16
    arithmetic oneDNN compiles a kernel for each number, which took a tenth of all training.
    """
    if x.device.type != "cpu":
        return x
    N = x.size(0)
    multiple = max(ROW_MULTIPLE, 2 ** (N.bit_length() - 4))
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, -N % multiple))


def gelu_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """linear(gelu(x)), with gelu(x) recomputed in the backward pass instead of kept.

    That is an eighth less of all that a layer keeps, for one more GELU (checkpointing, Chen et al.
    2016). `linear` may be any module.
    """
    y = F.gelu(x)
    place = y.data_ptr(), y.shape  # a reference to y itself would keep it

    def pack(kept: Tensor) -> Tensor | None:
        return None if (kept.data_ptr(), kept.shape) == place else kept

    def unpack(kept: Tensor | None) -> Tensor:
        return F.gelu(x.detach()) if kept is None else kept

    with saved_tensors_hooks(pack, unpack):
        return linear(y)


class ByteDropout(nn.Dropout):
    """nn.Dropout, on a CPU by one random byte a number, with p rounded to a multiple of 1/256.

    nn.Dropout draws a float for each number, which takes four times as long as all of this.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or x.device.type != "cpu":
            return super().forward(x)
        drop = min(max(round(256 * self.p), 1), 255)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64)
        words.random_(-(2**63), None)  # all 64 bits
        noise = words.view(torch.uint8)[: x.numel()].view(x.shape)
        # 0 or 1, not by a comparison: bools take three times as long. Autograd keeps the bytes.
        kept = noise.clamp_(drop - 1, drop).sub_(drop - 1)
        return (x * kept).mul_(256 / (256 - drop))


def equal_lengths(
    cu_seqlens_q: Tensor, cu_seqlens: Tensor, of_queries: list[Tensor], of_keys: list[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Neighbouring sequences with equally many queries m and equally many keys n, as one batch.

    They come as views: (sequences, H, m, …) of each tensor (M, H, …) of queries, then (sequences,
    H, n, …) of each tensor (T, H, …) of keys. One call computes a batch, which is fast where
    sequences are sorted by length.
    """
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens.diff().tolist(), strict=True)
    runs = [(len(list(run)), m, n) for (m, n), run in groupby(lengths)]

    def views(x: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
        parts = x.split([count * length for count, length in shapes])
        return [y.unflatten(0, s).transpose(1, 2) for y, s in zip(parts, shapes, strict=True)]

    queries = [views(x, [(count, m) for count, m, _ in runs]) for x in of_queries]
    keys = [views(x, [(count, n) for count, _, n in runs]) for x in of_keys]
    return zip(*queries, *keys, strict=True)
