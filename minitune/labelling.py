"""`finetune.py --predict`: new reviews in, labels out, in the same order."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from minitune.data import SUFFIXES, Dataset, Row
from minitune.errors import UserError
from minitune.machine import check_device
from minitune.precision import Precision
from minitune.prediction import Classifier
from minitune.processes import Processes
from minitune.reviews import label_index

BATCH_TOKENS = 8192


def label_new_reviews(args: argparse.Namespace) -> None:
    """Read texts, print one line for each; what is not an answer goes to stderr."""
    check_device(args.device)
    sys.stdout.reconfigure(encoding="utf-8")  # as every file, whatever the locale says
    name = args.model or _latest_run(args.out)
    classifier = Classifier.load(name, args.attention)
    device = Processes(args.device).device
    precision = Precision.choose(args.precision, device)
    say(f"model: {name}; labels: {', '.join(classifier.labels.values())}; precision: {precision.name}")

    expected: list[str | None] = []  # the labels of the rows, where they come with any

    def texts() -> Iterator[str]:
        for number, row in enumerate(_rows(args.predict), start=1):
            index = label_index(row.label, classifier.labels, numbers_too=True) if row.label else None
            if row.label and index is None:
                names = ", ".join(classifier.labels.values())
                raise UserError(f"row {number}: the label {row.label} is none of the model's: {names}")
            expected.append(classifier.labels.get(index))
            yield row.text

    table = csv.writer(sys.stdout, lineterminator="\n")
    if not args.json:
        table.writerow(["label", "probability", "truncated", "text"])
    right, known, cut = 0, 0, 0
    predictions = classifier.predict(texts(), device, precision, args.batch_tokens or BATCH_TOKENS)
    for number, prediction in enumerate(predictions):
        p = prediction.probabilities[prediction.label]
        if args.json:
            print(json.dumps(asdict(prediction), ensure_ascii=False))
        else:
            cells = [prediction.label, f"{p:.4f}", str(prediction.truncated).lower(), prediction.text]
            table.writerow(cells)
        cut += prediction.truncated
        known += expected[number] is not None
        right += expected[number] == prediction.label
    if cut:
        count = f"{cut:,} of {len(expected):,}"
        say(f"{count} had more than {classifier.max_len} tokens: their two ends were read")
    if known:
        say(f"accuracy: {right / known:.2%} of {known:,} labelled rows")


def say(line: str) -> None:
    """To stderr: stdout is for the answers."""
    print(line, file=sys.stderr)


def _rows(arguments: list[str]) -> Iterator[Row]:
    """Each argument is a file by its name, - for the lines of standard input, or else a text."""
    for argument in arguments:
        if argument == "-":
            yield from _standard_input()
        elif os.path.isfile(argument) or (Path(argument).suffix in SUFFIXES and " " not in argument):
            yield from Dataset(argument, option="--predict").read()
        elif not argument.strip():
            raise UserError("--predict: the text is empty")
        else:
            try:
                argument.encode()
            except UnicodeEncodeError:  # Python hands over bytes that are no UTF-8 as half characters
                raise UserError("--predict: the text is not UTF-8") from None
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
