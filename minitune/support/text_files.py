"""Rows of text from .txt, .csv, .tsv, .jsonl and .parquet files, read one by one."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from minitune.support.errors import UserError

SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
LONGEST_LINE = 1 << 20  # characters; a longer line of a .txt file is read as several texts
LONGEST_ROW = 1 << 24  # characters; in other files a longer line or cell is an error
PARQUET_ROWS = 1024  # of a parquet file are in memory at a time

Cells = Sequence[tuple[str | None, Any]]  # (column, value) of each cell of a row


class Columns(NamedTuple):
    """The columns of a file that hold a row's text and its label."""

    text: str = "text"
    label: str = "label"


DEFAULT_COLUMNS = Columns()


class Row(NamedTuple):
    """A text, its label if it has one, and its split if the source decides that."""

    text: str
    label: str | None = None
    split: str | None = None


def read_lines(file: Path, longest: int) -> Iterator[str]:
    """The lines of a text file; a line of more than `longest` characters is cut into several.

    Raises UserError if it is not UTF-8, or for a line of LONGEST_ROW characters.
    """
    if file.exists() and not file.is_file():  # reading a pipe would wait for ever
        raise UserError(f"{file} is not a regular file")
    with open(file, encoding="utf-8-sig", newline="") as opened:
        try:
            for line in iter(lambda: opened.readline(longest), ""):
                if len(line) == LONGEST_ROW:
                    raise UserError(f"{file}: a line of more than {LONGEST_ROW:,} characters")
                yield line
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text ({error.reason})") from error


def read_whole(file: Path) -> str:
    """The text of a file that holds one review."""
    if file.stat().st_size > LONGEST_ROW:
        raise UserError(f"{file}: {file.stat().st_size:,} bytes are no review")
    return "".join(read_lines(file, LONGEST_ROW))


def read_rows(file: Path, columns: Columns = DEFAULT_COLUMNS) -> Iterator[Row]:
    """The rows of a file. In a .txt file each line is a text."""
    is_table = file.suffix.lower() != ".txt"
    for where, cells in read_cells(file, columns):
        yield make_row(where, cells, columns if is_table else DEFAULT_COLUMNS)


def read_cells(file: Path, columns: Columns = DEFAULT_COLUMNS) -> Iterator[tuple[str, Cells]]:
    """(where, cells) of each row of a file; `where` is its file and line, for errors."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        yield from _read_parquet(file, columns)
        return
    if kind in (".csv", ".tsv"):
        yield from _read_table(file, "\t" if kind == ".tsv" else ",")
        return
    lines = read_lines(file, LONGEST_LINE if kind == ".txt" else LONGEST_ROW)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, [("text", line.strip())] if kind == ".txt" else _parse_json(line, where)


def _read_table(file: Path, delimiter: str) -> Iterator[tuple[str, Cells]]:
    csv.field_size_limit(LONGEST_ROW)  # the library's limit is too low for a long review
    # strict: a quote that never closes is an error, and does not take in the rest of the file.
    table = csv.reader(read_lines(file, LONGEST_ROW), delimiter=delimiter, strict=True)
    try:
        header = next(table, [])
        for row in filter(None, table):  # an empty line is no row
            yield f"{file}, line {table.line_num}", list(zip_longest(header, row))
    except csv.Error as error:
        raise UserError(f"{file}: not a table: {error}") from error


def _read_parquet(file: Path, columns: Columns) -> Iterator[tuple[str, Cells]]:
    """The rows of a parquet file, PARQUET_ROWS in memory at a time, of these columns alone.

    Files of the Hugging Face hub may have numbers for labels, with names in the file's metadata;
    a number without a name, -1, is no label.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{file}: parquet files need pyarrow: pip install pyarrow") from error
    try:
        with ParquetFile(file) as opened:
            schema = opened.schema_arrow
            labels = _label_names(schema.metadata or {}, columns.label)
            # With no such column make_row says which there are.
            wanted = [name for name in schema.names if name in columns] or None
            wanted = wanted if columns.text in schema.names else None
            # One row group after another: of several together pyarrow keeps what it has read.
            groups = range(opened.num_row_groups)
            options = {"batch_size": PARQUET_ROWS, "columns": wanted}
            parts = (opened.iter_batches(row_groups=[group], **options) for group in groups)
            rows = (row for part in parts for batch in part for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                if labels and isinstance(row.get(columns.label), int):
                    row[columns.label] = labels.get(row[columns.label])
                yield f"{file}, row {number}", list(row.items())
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file}: not a parquet file: {reason}") from error


def _label_names(metadata: dict[bytes, bytes], column: str) -> dict[int, str]:
    """The names of numbered labels by the metadata of a file; empty where it has none."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
        return dict(enumerate(map(str, names)))
    except (KeyError, TypeError, ValueError):
        return {}


def _parse_json(line: str, where: str) -> Cells:
    try:  # as pairs: in a dict the second of two columns of one name would replace the first
        cells = json.loads(line, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(cells, tuple):
        raise UserError(f"{where}: not a JSON object")
    return cells


def make_row(where: str, cells: Cells, columns: Columns = DEFAULT_COLUMNS) -> Row:
    """A row from the cells of a file's line. UserError if they make no sense.

    A column `label` may be missing; one of another name, which somebody has asked for, may not.
    """
    names = [name and name.strip() for name, _ in cells]
    values = dict(zip(names, (value for _, value in cells), strict=True))
    text, label = values.get(columns.text), values.get(columns.label)
    found = f"columns: {', '.join(map(str, names)) or 'none'}"[:200]
    needed = [name for name in columns if name != "label"]
    problem = ""
    if missing := [name for name in needed if name not in values]:
        problem = f"no column named {missing[0]} ({found})"
    elif any(names.count(name) > 1 for name in columns):
        problem = f"two columns of one name ({found})"
    elif None in values:
        problem = "more cells than columns; a text with a delimiter in it needs quotes"
    elif text and not isinstance(text, str):
        problem = f"the column {columns.text} holds {str(text)[:40]}, not a string"
    elif not text or not text.strip():
        problem = f"the column {columns.text} is empty"
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
