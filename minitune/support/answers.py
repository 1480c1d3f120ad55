"""Answers about texts: what a prediction is, texts from standard input, and how answers print."""

import contextlib
import csv
import io
import itertools
import json
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

from minitune.support.errors import UserError, plural

BLOCK, BLOCK_CHARACTERS = 2048, 1 << 20  # a block of texts is answered at a time: its limits
LONGEST_LINE = 1 << 24  # bytes of standard input
MOMENT = 0.1  # seconds to wait for more standard input before the texts so far are answered


@dataclass
class Prediction:
    """The answer for one text."""

    text: str
    label: str
    probabilities: dict[str, float]
    truncated: bool

    def cells(self) -> dict[str, str]:
        """The columns of its line in a table, the text last since it is the longest."""
        facts = {"label": self.label, "probability": f"{self.probabilities[self.label]:.4f}"}
        return facts | {"truncated": str(self.truncated).lower(), "text": self.text}

    def show(self, header: bool) -> str:
        """The answer as a line of CSV, below the names of the columns if `header`."""
        cells = self.cells()
        lines = [cells.keys(), cells.values()] if header else [cells.values()]
        return "\n".join(map(_csv_line, lines))


def print_answers(
    rows: Iterable[tuple | None],
    predict: Callable[[list[str]], Iterable[Prediction]],
    as_json: bool,
    cut: str,
) -> None:
    """Answer texts block by block, and print each answer: a line of JSON, or what it shows.

    A row begins with (text, its right label or None). None instead of a row: answer those before
    it now. How many texts were too long, of which `cut` says what happened to them, and the
    accuracy where labels are known go to stderr.
    """
    count = right = labelled = truncated = 0
    for block in _blocks(rows):
        answers = predict([text for text, *_ in block])
        for (_, label, *_), answer in zip(block, answers, strict=True):
            line = json.dumps(asdict(answer), ensure_ascii=False) if as_json else None
            print(line or answer.show(header=count == 0))
            count += 1
            truncated += answer.truncated
            labelled += label is not None
            right += label == answer.label
        sys.stdout.flush()
    if not count:
        raise UserError("there is no text in what was given")
    if truncated:
        say(f"{truncated:,} of {count:,} {cut}")
    if labelled:
        say(f"accuracy: {right / labelled:.2%} of {plural(labelled, 'labelled row')}")


def say(line: str) -> None:
    """To stderr: stdout is for the answers."""
    print(line, file=sys.stderr)


def lines_of_standard_input() -> Iterator[str | None]:
    """Each line that is not blank; None where the next one is not there yet.

    Raises UserError for bytes that are not UTF-8, or a line that would fill the memory.
    """
    stream, rest, chunk = sys.stdin.buffer, b"", b"more"
    while chunk:
        chunk = stream.read1(1 << 20)  # waits for the first byte only; at the end there is none
        *lines, rest = (rest + chunk).split(b"\n")
        if not chunk:
            lines.append(rest)
        if len(rest) > LONGEST_LINE:
            raise UserError(f"standard input: a line of more than {LONGEST_LINE:,} bytes")
        for line in filter(bytes.strip, lines):
            try:
                yield line.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"standard input: not UTF-8 text ({error.reason})") from error
        with contextlib.suppress(io.UnsupportedOperation):  # no pipe or file: it never waits
            if not select.select([stream], [], [], MOMENT)[0]:
                yield None


def _blocks(rows: Iterable[tuple | None]) -> Iterator[list[tuple]]:
    """Rows in lists that fit into memory; None ends a list."""
    block, characters = [], 0
    for row in itertools.chain(rows, [None]):
        if row:
            block.append(row)
            characters += len(row[0])
        if block and (not row or len(block) == BLOCK or characters >= BLOCK_CHARACTERS):
            yield block
            block, characters = [], 0


def _csv_line(cells: Iterable[str]) -> str:
    # With its own line ends the library also quotes a carriage return; Python 3.11.7 needs that.
    line = io.StringIO(newline="")
    csv.writer(line).writerow(cells)
    return line.getvalue().removesuffix("\r\n")
