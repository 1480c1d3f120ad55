"""A tokenised corpus on disk: written once, then read through a memory map.

    data/cache/KEY/tokenizer.json, vocab.txt    the tokenizer that made the ids
    data/cache/KEY/SPLIT.tokens                 ids of all texts end to end, uint16 or uint32
    data/cache/KEY/SPLIT.ends.npy               (N,) int64, where each text ends
    data/cache/KEY/unigrams.npy                 (V,) int64, how often each id occurs in train

KEY depends on all that the content depends on (files by name, size and time of change). Texts
stream through in blocks; what stays in memory is where sequences start, 16 bytes each.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minitune.data import Dataset
from minitune.support.errors import UserError
from minitune.support.runs import publish_directory
from minitune.tokenizer import Tokenizer

CACHE = Path(__file__).parents[1] / "data" / "cache"
FORMAT = 2  # raise it when the content of a cache changes for the same key
SPLITS = ("train", "validation")
BLOCK = 1 << 20  # characters tokenised at a time
PIECES_BLOCK = 1 << 18  # texts cut at a time
DAY = 24 * 3600  # seconds
VOCABULARY_SAMPLE = 100 << 20  # bytes of text that a vocabulary is learned from


class Corpus:
    """The train and validation texts of a dataset as token ids. `Corpus.open` makes or finds it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.tokenizer = Tokenizer.load(directory)
        self.unigrams = np.load(directory / "unigrams.npy")
        self.dtype = _dtype(self.tokenizer)

    @classmethod
    def open(
        cls,
        dataset: Dataset,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        log: Callable[[str], None] = print,
    ) -> "Corpus":
        """The cached corpus, tokenised now if it is not there yet.

        `tokenizer` None: one of `vocab_size` entries is learned from the training rows, and no
        others (validation and test stay unseen).
        """
        directory = CACHE / cls.key(dataset, tokenizer, vocab_size)
        if not directory.is_dir():
            log(f"tokenising {dataset.name} (once; kept in {directory})")
            _remove_leftovers(directory)
            partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
            partial.mkdir(parents=True)
            try:
                _build(dataset, tokenizer, vocab_size, partial)
                publish_directory(partial, directory)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        return cls(directory)

    @staticmethod
    def key(dataset: Dataset, tokenizer: Tokenizer | None, vocab_size: int) -> str:
        """The name of this corpus's directory: another one for other texts or another tokenizer."""
        with_tokenizer = tokenizer.files()["tokenizer.json"].decode() if tokenizer else vocab_size
        facts = [FORMAT, dataset.fingerprint(), with_tokenizer]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def chunks(self, split: str, max_len: int, overlap: bool = True) -> "Chunks":
        """The texts of a split, cut to sequences of at most `max_len` tokens."""
        return Chunks(self, split, max_len, overlap)

    def unigram_entropy(self) -> float:
        """Nats a token that the best guess without any context costs: the level of the plateau."""
        p = self.unigrams[self.unigrams > 0] / self.unigrams.sum()
        return float(-(p * np.log(p)).sum())


class Chunks:
    """Sequences [CLS] tokens [SEP], cut from texts.

    A text of more than max_len - 2 tokens becomes several chunks of that many, and a shorter last
    one. With `overlap` the last one begins earlier instead and is as long as the others: steps over
    batches of one shape are about 10% faster, since oneDNN compiles a kernel for each new shape.
    """

    def __init__(self, corpus: Corpus, split: str, max_len: int, overlap: bool):
        ends = np.load(corpus.directory / f"{split}.ends.npy", mmap_mode="r")
        # In blocks, or the arrays in between would need several times the memory of the result.
        blocks = [
            _cut(ends[i : i + PIECES_BLOCK], ends[i - 1] if i else 0, max_len - 2, overlap)
            for i in range(0, len(ends), PIECES_BLOCK)
        ]
        self.starts = np.concatenate([starts for starts, _ in blocks])  # (N,) int64
        self.lengths = np.concatenate(
            [lengths for _, lengths in blocks]
        )  # (N,) int32, with the frame
        self.path, self.dtype, self.max_len = (
            corpus.directory / f"{split}.tokens",
            corpus.dtype,
            max_len,
        )
        self.tokenizer = corpus.tokenizer

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, indices: Iterable[int]) -> list[Tensor]:
        """The token ids of these chunks, each (n,) int64."""
        # Mapped anew each time: pages of a map that stays open count as this process's memory.
        tokens = np.memmap(self.path, dtype=self.dtype, mode="r")
        cls, sep = np.split(np.array(self.tokenizer.frame([])), 2)
        bodies = (tokens[self.starts[i] :][: self.lengths[i] - 2] for i in indices)
        return [torch.from_numpy(np.concatenate([cls, body, sep])) for body in bodies]


def _cut(ends: np.ndarray, start: int, body: int, overlap: bool) -> tuple[np.ndarray, np.ndarray]:
    """(where each chunk starts, its length with the frame), for texts that end at `ends`."""
    text_starts = np.concatenate([[start], ends[:-1]])
    text_lengths = ends - text_starts
    counts = np.maximum(-(-text_lengths // body), 1)
    first_chunk = counts.cumsum() - counts
    offsets = (np.arange(counts.sum()) - np.repeat(first_chunk, counts)) * body
    lengths = np.repeat(text_lengths, counts)
    if overlap:
        offsets = np.minimum(offsets, np.maximum(lengths - body, 0))
    starts = np.repeat(text_starts, counts) + offsets
    return starts, (np.minimum(lengths - offsets, body) + 2).astype(np.int32)


def _dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def _build(dataset: Dataset, tokenizer: Tokenizer | None, vocab_size: int, directory: Path) -> None:
    if tokenizer is None:
        tokenizer = Tokenizer.train(_sample(dataset), vocab_size)
    for name, content in tokenizer.files().items():
        (directory / name).write_bytes(content)
    unigrams = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for split in SPLITS:
        ends, end = [], 0
        with open(directory / f"{split}.tokens", "wb") as file:
            for block in _blocks(row.text for row in dataset.rows(split)):
                encoded = [ids for ids in tokenizer.encode(block) if ids]
                if not encoded:
                    continue
                ends.append(end + np.cumsum([len(ids) for ids in encoded]))
                end = int(ends[-1][-1])
                tokens = np.concatenate([np.array(ids, dtype=_dtype(tokenizer)) for ids in encoded])
                tokens.tofile(file)
                if split == "train":
                    unigrams += np.bincount(tokens, minlength=len(unigrams))
        if not ends:
            raise UserError(f"{dataset.name} has too few texts: none is left for {split}")
        np.save(directory / f"{split}.ends.npy", np.concatenate(ends).astype(np.int64))
    np.save(directory / "unigrams.npy", unigrams)


def _sample(dataset: Dataset) -> Iterator[str]:
    """Training texts to learn a vocabulary from: all, or of a huge corpus every k-th."""
    size = sum(file.stat().st_size for file in dataset.files)
    every = -(-size // VOCABULARY_SAMPLE) or 1
    return (row.text for row in islice(dataset.rows("train"), 0, None, every))


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of about BLOCK characters."""
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _remove_leftovers(directory: Path) -> None:
    """Remove what a killed process left half-made of this cache; younger ones may be at work."""
    for partial in directory.parent.glob(f"{directory.name}.partial-*"):
        if time.time() - partial.stat().st_mtime > DAY:
            shutil.rmtree(partial, ignore_errors=True)
