"""New texts from the command line: `finetune.py --predict`, with or without --explain.

Each argument is a file by its name, - for the lines of standard input, or else a text.
"""

import argparse
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch

from minitune.data import Dataset, label_index
from minitune.explain import HIDDEN_WORDS, deletion_test, explain, words_of
from minitune.prediction import Classifier
from minitune.support import explanations
from minitune.support.answers import lines_of_standard_input, print_answers, say
from minitune.support.cli import columns
from minitune.support.errors import UserError, plural
from minitune.support.results import table
from minitune.support.runtime import Runtime
from minitune.support.text_files import DEFAULT_COLUMNS, SUFFIXES, Columns, Row, make_row


def label_new_reviews(args: argparse.Namespace) -> None:
    """`finetune.py --predict`, from its options to the last answer."""
    classifier = _load(args)
    rows = rows_to_label(args.predict, "--predict", classifier.labels, columns(args))
    ends = "ends" if classifier.model.pooling == "cloze" else "two ends"
    cut = f"had more than {classifier.max_len} tokens: their {ends} were read"
    predict = functools.partial(classifier.predict, batch_tokens=args.batch_tokens)
    if args.explain:  # one after the other
        each = functools.partial(classifier.explain, batch_tokens=args.batch_tokens)
        predict = functools.partial(map, each)
    print_answers(rows, predict, args.json, cut)


def evaluate_explanations(args: argparse.Namespace) -> None:
    """`finetune.py --explain --evaluate N`: the deletion test on N test rows, in a table."""
    classifier, generator = _load(args), torch.Generator().manual_seed(args.seed)
    dataset = Dataset(args.data, args.test, columns=columns(args))
    texts = [row.text for row in dataset.rows("test")]
    inputs = classifier.read(texts)
    chosen, found, tests = [], [], []
    for i in torch.randperm(len(texts), generator=generator).tolist():
        words, _ = words_of(torch.from_numpy(inputs.ids[i]).long(), classifier.tokenizer)
        if len(words) >= 2 * HIDDEN_WORDS:  # or most are hidden, whichever are chosen
            chosen.append(inputs.ids[i])
    for ids in classifier.runtime.progress(chosen[: args.evaluate]):
        question = classifier.question(ids, args.batch_tokens)
        found.append(explain(question))
        tests.append(deletion_test(question, found[-1], generator))
    if not tests:
        raise UserError(f"{args.data}: no test row has {2 * HIDDEN_WORDS} words")
    rows = explanations.summarise(tests)
    if args.json:
        print(*map(json.dumps, rows), sep="\n")
        return
    difference = mean(explanation.difference for explanation in found)
    print(f"{plural(len(tests), 'test row')} of {args.data}; logit difference {difference:.2f}")
    print(table(rows, explanations.COLUMNS))
    largest = max(explanation.error for explanation in found)
    say(f"integrated gradients: the largest completeness error is {largest:.2%}")


def _load(args: argparse.Namespace) -> Classifier:
    """The model that the options mean; explanations are computed in float32."""
    precision = "fp32" if args.explain else args.precision
    runtime = Runtime.start(args.device, precision, args.threads)
    name = latest_run(args.out) if args.model is None else args.model
    classifier = Classifier.load(name, runtime, args.attention, args.base)
    labels = ", ".join(classifier.labels.values())
    say(f"model: {name}; labels: {labels}; precision: {runtime.precision}")
    if classifier.bag and args.explain:
        say("explained is the network alone, without its bag of words")
    return classifier


def latest_run(out: Path) -> str:
    """The run of finetune.py that ended last."""
    finished = [
        path for path in out.rglob("metrics.json") if "scratch" not in path.relative_to(out).parts
    ]
    if not finished:
        raise UserError(f"no fine-tuned model in {out}: train one first, or name one with --model")
    return str(max(finished, key=lambda path: path.stat().st_mtime).parent)


def rows_to_label(
    arguments: list[str], option: str, names: dict[int, str], columns: Columns = DEFAULT_COLUMNS
) -> Iterator[Row | None]:
    """The texts that a command line gives, for print_answers; None: answer those before it now.

    Each argument of `option` is the name of a file, - for the lines of standard input, or else a
    text. Where a row has a label, by name or by number, it gets the model's name for it, one of
    `names`. Raises UserError where there is no such file, or no such label.
    """
    number = 0
    for argument in arguments:
        for row in _rows(argument, option, columns):
            if row:
                number += 1
                index = label_index(row.label, names, numbers_too=True)
                if row.label and index is None:
                    known = f"none of the model's: {', '.join(names.values())}"
                    raise UserError(f"row {number}: the label {row.label} is {known}")
                row = row._replace(label=names.get(index))
            yield row


def _rows(argument: str, option: str, columns: Columns) -> Iterator[Row | None]:
    """The rows of one argument of the command line."""
    if argument == "-":
        for line in lines_of_standard_input():
            yield make_row("standard input", [("text", line)]) if line else None
    elif os.path.exists(argument):
        yield from Dataset(argument, option=option, columns=columns).read()
    elif argument.lower().endswith(SUFFIXES):
        hint = "a text like that goes through standard input, -"
        raise UserError(f"{option} {argument}: no such file ({hint})")
    else:
        yield make_row(option, [("text", argument)])
