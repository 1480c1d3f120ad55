"""Packed batches: sequences laid end to end, without padding; and which sequences form a batch.

A batch is filled up to a number of tokens, so that all steps cost about the same, and from
sequences of similar length, so that attention can compute those of equal length together.
"""

import itertools
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
        """(B+1,) int32: how many of these ascending positions come before each of `cu_seqlens`.

        Sequences of 3 and 2 tokens and positions 0 and 3 give [0, 1, 2]: one position in each. For
        attention in which only these tokens are queries, these are the `cu_seqlens` of the queries.
        """
        return torch.searchsorted(positions, self.cu_seqlens.to(positions.dtype), out_int32=True)

    @classmethod
    def from_sequences(cls, sequences: list[Tensor]) -> "PackedBatch":
        """Pack 1-D tensors of token ids."""
        lengths = torch.tensor([0] + [len(s) for s in sequences], dtype=torch.int32)
        tokens = torch.cat(sequences).long()
        return cls(tokens, lengths.cumsum(0, dtype=torch.int32), int(lengths.max()))

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on another device."""
        tokens, cu_seqlens = copy_to(device, self.tokens, self.cu_seqlens)
        return PackedBatch(tokens, cu_seqlens, self.max_seqlen)


def copy_to(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """The tensors on a device. A GPU copies from pinned memory while the program continues."""
    if device.type != "cuda":
        return [x.to(device) for x in tensors]
    with torch.cuda.device(device):  # each thread has a current GPU of its own
        pinned = [x if x.is_cuda else x.pin_memory() for x in tensors]
        return [x.to(device, non_blocking=True) for x in pinned]


WINDOW = 64  # batches whose sequences are sorted by length together


def shuffled_batches(
    lengths: np.ndarray, batch_tokens: int, seed: int, skip: int = 0
) -> Iterator[np.ndarray]:
    """The indices of the sequences in each batch, epoch after epoch, without end.

    In each epoch all sequences are shuffled and divided into windows. A window is sorted by length
    and cut into batches of at most `batch_tokens` tokens, which come in random order. Lengths are
    thus similar within a batch and different between batches. A sequence with more tokens is a
    batch by itself. The order depends only on `seed`. A resumed run skips the batches it has had.
    """
    window = max(1, WINDOW * batch_tokens // int(lengths.max()))
    for epoch in itertools.count():
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(np.arange(len(lengths), dtype=np.int32))
        for start in range(0, len(order), window):
            drawn = order[start : start + window]
            drawn = drawn[np.argsort(lengths[drawn], kind="stable")]
            batches = fill_batches(drawn, lengths, batch_tokens)
            for i in rng.permutation(len(batches)):
                if skip:
                    skip -= 1
                else:
                    yield batches[i]


def sorted_batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Batches of all sequences, sorted by length: for inference, where order does not matter."""
    return fill_batches(np.argsort(lengths, kind="stable"), lengths, batch_tokens)


def fill_batches(order: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Cut a sequence of indices into batches of at most `batch_tokens` tokens, dropping none."""
    batches, first, total = [], 0, 0
    for i, length in enumerate(lengths[order].tolist()):
        if total + length > batch_tokens and i > first:
            batches.append(order[first:i])
            first, total = i, 0
        total += length
    if first < len(order):
        batches.append(order[first:])
    return batches


def reading_tokens(device: torch.device) -> int:
    """How many tokens to put into a batch that is only read, without gradients.

    On a CPU 4,096 are 1 to 3% faster but take 6 to 18% more memory, and 2,048 are 3% slower
    (tests/benchmarks/LOG.md). A GPU needs larger batches.
    """
    return 3072 if device.type == "cpu" else 16384
