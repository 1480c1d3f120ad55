"""Which sequences go together: batches filled to a token budget from sequences of similar length.

Steps then cost about the same, and attention finds neighbours of equal length to group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass
class PackedBatch:
    """Sequences laid end to end, and where each of them ends."""

    tokens: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B+1,) int32, cumulative lengths, starting with 0
    max_seqlen: int

    @cached_property
    def sequence_ids(self) -> Tensor:
        """(T,) int64: the index of the sequence that each token belongs to."""
        lengths = self.cu_seqlens.diff()
        ids = torch.arange(lengths.numel(), device=lengths.device)
        return ids.repeat_interleave(lengths, output_size=self.tokens.numel())

    @property
    def cls_positions(self) -> Tensor:
        """(B,) int64: where each sequence begins, with its [CLS]."""
        return self.cu_seqlens[:-1].long()

    def count_before(self, positions: Tensor) -> Tensor:
        """(B+1,) int32: how many of these ascending positions come before each; the last is M."""
        return torch.searchsorted(positions, self.cu_seqlens.to(positions.dtype), out_int32=True)

    @classmethod
    def from_sequences(cls, sequences: list[Tensor]) -> "PackedBatch":
        """Pack 1-D tensors of token ids."""
        lengths = torch.tensor([0] + [len(s) for s in sequences], dtype=torch.int32)
        tokens = torch.cat(sequences).long()
        return cls(tokens, lengths.cumsum(0, dtype=torch.int32), int(lengths.max()))

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on another device."""
        move = {"device": device, "non_blocking": True}
        return PackedBatch(self.tokens.to(**move), self.cu_seqlens.to(**move), self.max_seqlen)


WINDOW = 64  # batches that are drawn together before they are sorted by length


def shuffled_batches(
    lengths: np.ndarray, batch_tokens: int, seed: int, skip: int = 0
) -> Iterator[np.ndarray]:
    """Indices of the sequences of one batch after another, epoch after epoch, without end.

    Every epoch shuffles all sequences, takes a window of them at a time, sorts it by length, fills
    batches of at most `batch_tokens` tokens and yields them in random order: lengths are alike
    within a batch and mixed between batches. The order depends on `seed` alone; `skip` batches are
    passed over without being read, which is how a run resumes. A sequence longer than the budget
    is a batch of its own.
    """
    window = max(1, WINDOW * batch_tokens // int(lengths.max()))
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(np.arange(len(lengths), dtype=np.int32))
        for start in range(0, len(order), window):
            chosen = order[start : start + window]
            batches = filled(
                chosen[np.argsort(lengths[chosen], kind="stable")], lengths, batch_tokens
            )
            for i in rng.permutation(len(batches)):
                if skip:
                    skip -= 1
                else:
                    yield batches[i]
        epoch += 1


def sorted_batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """All sequences once, sorted by length: for inference, where their order does not matter."""
    return filled(np.argsort(lengths, kind="stable"), lengths, batch_tokens)


def filled(order: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Cut a sequence of indices into batches of at most `batch_tokens` tokens, dropping none."""
    batches, first, total = [], 0, 0
    for i, length in enumerate(lengths[order].tolist()):
        if total + length > batch_tokens and i > first:
            batches.append(order[first:i])
            first, total = i, 0
        total += length
    return batches + [order[first:]] if first < len(order) else batches


def reading_tokens(device: torch.device) -> int:
    """The token budget of a batch that needs no gradient.

    On a CPU a small one: 4,096 tokens are 1 to 3% faster and take 6 to 18% more memory, 2,048 are
    3% slower (tests/benchmarks/LOG.md). A GPU needs larger ones.
    """
    return 3072 if device.type == "cpu" else 16384
