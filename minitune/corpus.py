"""A tokenised corpus on disk: written once, then read through a memory map.

    data/cache/KEY/tokenizer.json …     the tokenizer that made the ids
    data/cache/KEY/SPLIT.tokens         ids of all texts end to end, uint16 or uint32
    data/cache/KEY/SPLIT.ends.npy       (N,) int64, where each text ends
    data/cache/KEY/unigrams.npy         (V,) int64, how often each id occurs in train

KEY is a hash of all that the content depends on; text files count by name, size and time of change.
The environment variable MINITUNE_CACHE names another directory than data/cache. A corpus may be
larger than memory, which holds 12 bytes for each chunk: where it starts and how long it is.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minitune.data import Dataset
from minitune.support.cache import make_once
from minitune.support.errors import UserError
from minitune.tokenizer import Tokenizer

CACHE = Path(os.environ.get("MINITUNE_CACHE") or Path(__file__).parents[1] / "data" / "cache")
VERSION = 3  # to be raised when the same texts and tokenizer give other files
SPLITS = ("train", "validation")
FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "unigrams.npy"]
FILES += [f"{split}.{content}" for split in SPLITS for content in ("tokens", "ends.npy")]
CHARACTERS_AT_ONCE = 1 << 20  # are tokenised together
TEXTS_AT_ONCE = 1 << 18  # are cut together
VOCABULARY_SAMPLE = 100 << 20  # bytes of text that a vocabulary is learned from


class Corpus:
    """The train and validation texts of a dataset as token ids. `Corpus.open` makes or finds it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.tokenizer = Tokenizer.load(directory)
        self.unigrams = np.load(directory / "unigrams.npy")  # (V,) int64
        self.dtype = _dtype(self.tokenizer)

    @classmethod
    def open(
        cls,
        dataset: Dataset,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        log: Callable[[str], None] = print,
    ) -> "Corpus":
        """The corpus in the cache. It is tokenised first if it is not there, or damaged.

        If `tokenizer` is None, a vocabulary of `vocab_size` entries is learned from the train rows
        alone: validation and test rows stay unseen.
        """
        directory = CACHE / cls.key(dataset, tokenizer, vocab_size)

        def build(folder: Path) -> None:
            log(f"tokenising {dataset.name} (once; kept in {directory})")
            _build(dataset, tokenizer, vocab_size, folder)

        make_once(directory, FILES, build, log)
        return cls(directory)

    @staticmethod
    def key(dataset: Dataset, tokenizer: Tokenizer | None, vocab_size: int) -> str:
        """The name of a corpus's directory, a hash of its texts and its tokenizer."""
        with_tokenizer = tokenizer.files()["tokenizer.json"].decode() if tokenizer else vocab_size
        facts = [VERSION, dataset.fingerprint(), with_tokenizer]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def chunks(self, split: str, max_len: int, overlap: bool = True) -> "Chunks":
        """The texts of a split, cut to sequences of at most `max_len` tokens."""
        return Chunks(self, split, max_len, overlap)

    def unigram_entropy(self) -> float:
        """Entropy of the token frequencies in nats: the best loss of a guess without context."""
        p = self.unigrams[self.unigrams > 0] / self.unigrams.sum()
        return float(-(p * np.log(p)).sum())


class Chunks:
    """Sequences [CLS] tokens [SEP], cut from texts.

    A text of more than max_len - 2 tokens becomes several chunks of that many, and a shorter one at
    the end. With `overlap` the last one starts earlier and is as long as the others. Training is
    about 10% faster on that, since oneDNN, torch's library for CPUs, compiles
    a kernel for each new shape.
    """

    def __init__(self, corpus: Corpus, split: str, max_len: int, overlap: bool):
        self.tokenizer, self.dtype = corpus.tokenizer, corpus.dtype
        self.path = corpus.directory / f"{split}.tokens"
        ends = np.load(corpus.directory / f"{split}.ends.npy", mmap_mode="r")
        # In parts: cutting all texts at once would need several times the memory of the result.
        parts = [
            _cut(ends[i : i + TEXTS_AT_ONCE], ends[i - 1] if i else 0, max_len - 2, overlap)
            for i in range(0, len(ends), TEXTS_AT_ONCE)
        ]
        self.starts = np.concatenate([starts for starts, _ in parts])  # (N,) int64
        self.lengths = np.concatenate([lengths for _, lengths in parts])  # (N,) int32, framed

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, indices: Iterable[int]) -> list[Tensor]:
        """The token ids of these chunks, each (n,) int64."""
        # Mapped each time, since the pages of an open map count as memory of this process.
        tokens = np.memmap(self.path, dtype=self.dtype, mode="r")
        cls, sep = self.tokenizer.frame([])
        bodies = (tokens[self.starts[i] :][: self.lengths[i] - 2] for i in indices)
        return [torch.from_numpy(np.concatenate([[cls], body, [sep]])) for body in bodies]


def _cut(ends: np.ndarray, start: int, body: int, overlap: bool) -> tuple[np.ndarray, np.ndarray]:
    """(where each chunk starts, its length with [CLS] and [SEP]), for texts that end at `ends`.

    Chunks of `body` 10 of a text of 25 tokens start at 0, 10 and 20; with `overlap` at 0, 10, 15.
    """
    text_starts = np.concatenate([[start], ends[:-1]])
    text_lengths = ends - text_starts
    counts = np.maximum(-(-text_lengths // body), 1)  # chunks of each text, rounded up
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
    """Write the FILES of a corpus."""
    if tokenizer is None:
        tokenizer = Tokenizer.train(_sample(dataset), vocab_size)
    for name, content in tokenizer.files().items():
        (directory / name).write_bytes(content)
    unigrams = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for split in SPLITS:
        ends, end = [], 0
        with open(directory / f"{split}.tokens", "wb") as file:
            for texts in _in_parts(row.text for row in dataset.rows(split)):
                encoded = [ids for ids in tokenizer.encode(texts) if ids]
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
    """Train texts to learn a vocabulary from: all, or every k-th of a very large corpus."""
    size = sum(file.stat().st_size for file in dataset.files)
    every = -(-size // VOCABULARY_SAMPLE) or 1
    return (row.text for row in islice(dataset.rows("train"), 0, None, every))


def _in_parts(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of about CHARACTERS_AT_ONCE characters."""
    part, size = [], 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= CHARACTERS_AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part
