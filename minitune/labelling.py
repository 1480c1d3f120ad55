"""New reviews in, labels out, in the same order: `finetune.py --predict`, and the texts of `prompt.py`."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from minitune.batching import reading_tokens
from minitune.cli import check_utf8
from minitune.data import SUFFIXES, Dataset, Row
from minitune.errors import UserError
from minitune.machine import check_device
from minitune.precision import Precision
from minitune.prediction import Classifier, Prediction
from minitune.processes import Processes
from minitune.reviews import label_index


def label_new_reviews(args: argparse.Namespace) -> None:
    """`finetune.py --predict`, from its options to the last answer."""
    check_device(args.device)
    sys.stdout.reconfigure(encoding="utf-8")  # as every file, whatever the locale says
    name = args.model or _latest_run(args.out)
    classifier = Classifier.load(name, args.attention)
    device = Processes(args.device).device
    precision = Precision.choose(args.precision, device)
    say(f"model: {name}; labels: {', '.join(classifier.labels.values())}; precision: {precision.name}")

    def predict(texts: Iterator[str]) -> Iterator[Prediction]:
        batch_tokens = args.batch_tokens or reading_tokens(device)
        return classifier.predict(texts, device, precision, batch_tokens)

    cut = f"had more than {classifier.max_len} tokens: their two ends were read"
    print_answers(args.predict, "--predict", classifier.labels, predict, args.json, cut)


def print_answers(
    arguments: list[str],
    option: str,
    labels: dict[int, str],
    predict: Callable[[Iterator[str]], Iterator[Prediction]],
    as_json: bool,
    cut: str,
) -> None:
    """Read texts, print one line for each; what is not an answer goes to stderr.

    `arguments` are texts, files or -, given to `option`; `cut` says what happened to texts that are too long.
    """
    expected: list[str | None] = []  # the labels of the rows, where they come with any

    def texts() -> Iterator[str]:
        for number, row in enumerate(_rows(arguments, option), start=1):
            index = label_index(row.label, labels, numbers_too=True) if row.label else None
            if row.label and index is None:
                names = ", ".join(labels.values())
                raise UserError(f"row {number}: the label {row.label} is none of the model's: {names}")
            expected.append(labels.get(index))
            yield row.text

    table = csv.writer(sys.stdout, lineterminator="\n")
    right, known, truncated = 0, 0, 0
    for number, prediction in enumerate(predict(texts())):
        if as_json:
            print(json.dumps(asdict(prediction), ensure_ascii=False))
        else:
            cells = prediction.cells()
            if number == 0:
                table.writerow(cells)
            table.writerow(cells.values())
        truncated += prediction.truncated
        known += expected[number] is not None
        right += expected[number] == prediction.label
    if not expected:
        raise UserError(f"{option}: there is no text in what was given")
    if truncated:
        say(f"{truncated:,} of {len(expected):,} {cut}")
    if known:
        say(f"accuracy: {right / known:.2%} of {known:,} labelled rows")


def say(line: str) -> None:
    """To stderr: stdout is for the answers."""
    print(line, file=sys.stderr)


def _rows(arguments: list[str], option: str) -> Iterator[Row]:
    """Each argument is a file by its name, - for the lines of standard input, or else a text."""
    for argument in arguments:
        if argument == "-":
            yield from _standard_input()
        elif os.path.isfile(argument) or (Path(argument).suffix in SUFFIXES and " " not in argument):
            yield from Dataset(argument, option=option).read()
        elif not argument.strip():
            raise UserError(f"{option}: the text is empty")
        else:
            check_utf8(f"{option}: the text", argument)
            yield Row(argument)


def _standard_input() -> Iterator[Row]:
    try:
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
        for line in sys.stdin:
            if line.strip():
                yield Row(line.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 text ({error.reason})") from error


def _latest_run(out: Path) -> str:
    """The run of finetune.py that ended last."""
    finished = [path for path in out.rglob("metrics.json") if "scratch" not in path.relative_to(out).parts]
    if not finished:
        raise UserError(f"no fine-tuned model in {out}: train one first, or name one with --model")
    return str(max(finished, key=lambda path: path.stat().st_mtime).parent)
