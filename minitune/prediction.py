"""Fine-tuned models on disk, and new reviews labelled with them.

Full fine-tuning leaves a whole BERT directory (checkpoint.py). The other methods leave what they
trained and what it belongs to:

    trained.safetensors   adapters, LayerNorms and head; or the head alone
    trained.json          method, label names, longest text, and path and SHA-256 of the base model
"""

import argparse
import codecs
import contextlib
import csv
import functools
import io
import itertools
import json
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from minitune.attention import resolve_backend
from minitune.batching import reading_tokens, sorted_batches
from minitune.calibration import CALIBRATIONS, mean_log_probabilities
from minitune.checkpoint import (
    Trained,
    check_max_len,
    find_model,
    load_classifier,
    load_tokenizer,
    read_config,
)
from minitune.classification import TokenizedTexts
from minitune.data import LONGEST_LINE, PACKAGED, SUFFIXES, Dataset, Row, label_index, make_row
from minitune.finetuning import load_trained
from minitune.prompting import Prompt, in_words
from minitune.support.errors import UserError, plural
from minitune.support.runs import read_json
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer

BLOCK, BLOCK_CHARACTERS = 2048, 1 << 20  # texts that are in memory at a time
MOMENT = 0.1  # seconds to wait for the rest of a line of a pipe before the others are answered


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


class Classifier:
    """A fine-tuned model with its tokenizer and label names, ready for new texts.

    Classifier.load("runs/finetune/adapter").predict(["good fun"])
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        labels: dict[int, str],
        max_len: int,
        runtime: Runtime,
        base_hash: str = "",
    ):
        self.model = model.eval().to(runtime.device)
        self.tokenizer, self.labels, self.max_len = tokenizer, labels, max_len
        self.runtime = runtime
        self.base_hash = base_hash  # of the pretrained model; empty for a model of its own

    @classmethod
    def load(
        cls,
        name: str,
        runtime: Runtime | None = None,
        attention: str = "auto",
        base: str | None = None,
    ) -> "Classifier":
        """From the directory of a fine-tuning run, or any BertForSequenceClassification.

        `base` names the pretrained model of a run that saved only what it trained, if it was moved.
        """
        runtime = runtime or Runtime.start()
        directory = source = find_model(name)
        trained = None
        if (directory / "trained.json").is_file():
            trained = Trained.read(directory)
            source = trained.find_base(directory, base)
        head_size = read_config(source).head_size
        attention = resolve_backend(attention, runtime.device, runtime.dtype, head_size)
        if trained:
            model = load_trained(trained, directory, source, attention)
            where, max_len, labels = directory / "trained.json", trained.max_len, trained.labels
        elif base is not None:
            raise UserError(f"--base: {directory} holds a whole model and needs no other")
        else:
            model = load_classifier(directory, attention)
            where, labels = directory / "settings.json", model.config.id2label
            max_len = model.config.max_position_embeddings
            if where.is_file():
                max_len = read_json(where).get("max_len", max_len)
        check_max_len(max_len, model.bert.config, where)
        tokenizer = load_tokenizer(source, model.bert.config, remove_markup=bool(trained))
        return cls(model, tokenizer, labels, max_len, runtime, trained.base_hash if trained else "")

    def predict(self, texts: list[str], batch_tokens: int | None = None) -> list[Prediction]:
        """One prediction a text, in the order of the texts, `batch_tokens` read at a time."""
        sequences = TokenizedTexts(texts, self.tokenizer, self.max_len)
        probabilities = torch.empty(len(texts), len(self.labels))
        budget = batch_tokens or reading_tokens(self.runtime.device)
        # One context for all batches: while it lasts, autocast keeps the weights that it has
        # converted (those that require gradients, and not under inference_mode).
        with torch.no_grad(), self.runtime.autocast():
            for indices in sorted_batches(sequences.lengths, budget):
                logits = self.model(sequences.select(indices).pack().to(self.runtime.device))
                probabilities[torch.from_numpy(indices)] = logits.float().softmax(-1).cpu()
        if not probabilities.isfinite().all():
            raise UserError("the model's answers are no numbers: its weights must be damaged")
        answers = []
        rows = zip(texts, probabilities.tolist(), sequences.truncated, strict=True)
        for text, row, truncated in rows:
            by_name = {self.labels[i]: p for i, p in enumerate(row)}
            answers.append(Prediction(text, max(by_name, key=by_name.get), by_name, truncated))
        return answers


def load_together(
    runs: dict[str, str], runtime: Runtime | None = None, attention: str = "auto"
) -> dict[str, Classifier]:
    """Several runs by name, {name: directory}, which share the weights of one base in memory.

    Raises UserError where a run saved a whole model, or another base was trained on.
    """
    classifiers, shared = {}, {}
    for name, run in runs.items():
        classifiers[name] = classifier = Classifier.load(run, runtime, attention)
        if not classifier.base_hash:
            raise UserError(f"{run} holds a whole model, with no base to share")
        if len({one.base_hash for one in classifiers.values()}) > 1:
            raise UserError(f"{run} was trained on another base model than the others")
        for path, parameter in list(classifier.model.named_parameters()):
            if not parameter.requires_grad:
                module, _, leaf = path.rpartition(".")
                frozen = shared.setdefault(path, parameter)
                setattr(classifier.model.get_submodule(module), leaf, frozen)
    return classifiers


class Ensemble:
    """Several calibrated prompts that answer together: the mean of their log-probabilities."""

    def __init__(self, prompts: list[Prompt], calibration: str, unlabelled: list[list[int]]):
        """`calibration` is a key of CALIBRATIONS; `unlabelled` are token ids of texts."""
        self.prompts = prompts
        self.names = prompts[0].verbalizer.names  # of the labels
        self.biases = [CALIBRATIONS[calibration](prompt, unlabelled) for prompt in prompts]

    def log_probabilities(self, texts: list[list[int]]) -> Tensor:
        """(N, L) of the labels of these texts."""
        pairs = zip(self.prompts, self.biases, strict=True)
        return mean_log_probabilities([prompt.scores(texts) + bias for prompt, bias in pairs])

    def predict(self, texts: list[str], count: int) -> list["PromptPrediction"]:
        """One prediction a text, in the order of the texts.

        With the `count` most probable words in the blank of the first template.
        """
        first, room = self.prompts[0], min(prompt.room for prompt in self.prompts)
        ids = first.fill_mask.tokenizer.encode(texts)
        probabilities = self.log_probabilities(ids).exp().tolist()
        words, answers = first.most_probable_words(ids, count), []
        for text, tokens, row, likely in zip(texts, ids, probabilities, words, strict=True):
            by_name = dict(zip(self.names.values(), row, strict=True))
            label, truncated = max(by_name, key=by_name.get), len(tokens) > room
            answers.append(PromptPrediction(text, label, by_name, truncated, dict(likely)))
        return answers


@dataclass
class PromptPrediction(Prediction):
    """The answer for one text, and the words that the model would write."""

    words: dict[str, float]  # with their probabilities, the most probable first

    def cells(self) -> dict[str, str]:
        """Also the words."""
        *rest, text = super().cells().items()
        return dict([*rest, ("words", in_words(list(self.words.items()))), text])


def label_new_reviews(args: argparse.Namespace) -> None:
    """`finetune.py --predict`, from its options to the last answer."""
    runtime = Runtime.start(args.device, args.precision)
    name = _latest_run(args.out) if args.model is None else args.model
    classifier = Classifier.load(name, runtime, args.attention, args.base)
    labels = ", ".join(classifier.labels.values())
    say(f"model: {name}; labels: {labels}; precision: {runtime.precision}")
    cut = f"had more than {classifier.max_len} tokens: their two ends were read"
    predict = functools.partial(classifier.predict, batch_tokens=args.batch_tokens)
    print_answers(args.predict, "--predict", classifier.labels, predict, args.json, cut)


def print_answers(
    arguments: list[str],
    option: str,
    labels: dict[int, str],
    predict: Callable[[list[str]], list[Prediction]],
    as_json: bool,
    cut: str,
) -> None:
    """Read texts, print one line for each; what is not an answer goes to stderr.

    `arguments` are texts, files or -, given to `option`; `cut` says what happened to texts that are
    too long.
    """
    # Python before 3.11.9 quotes a carriage return only where it ends lines with one itself.
    lines = SimpleNamespace(write=lambda line: print(line.removesuffix("\r\n")))
    table = csv.writer(lines, lineterminator="\r\n")
    count, right, known, truncated = 0, 0, 0, 0
    for rows in _blocks(_rows(arguments, option)):
        indices = [label_index(row.label, labels, numbers_too=True) for row in rows]
        for number, (row, index) in enumerate(zip(rows, indices, strict=True), start=count + 1):
            if row.label and index is None:
                names = f"none of the model's: {', '.join(labels.values())}"
                raise UserError(f"row {number}: the label {row.label} is {names}")
        for index, answer in zip(indices, predict([row.text for row in rows]), strict=True):
            if as_json:
                print(json.dumps(asdict(answer), ensure_ascii=False))
            else:
                cells = answer.cells()
                table.writerows([cells] * (count == 0) + [cells.values()])
            count += 1
            truncated += answer.truncated
            known += index is not None
            right += labels.get(index) == answer.label
        sys.stdout.flush()
    if not count:
        raise UserError(f"{option}: there is no text in what was given")
    if truncated:
        say(f"{truncated:,} of {count:,} {cut}")
    if known:
        say(f"accuracy: {right / known:.2%} of {plural(known, 'labelled row')}")


def say(line: str) -> None:
    """To stderr: stdout is for the answers."""
    print(line, file=sys.stderr)


def _blocks(rows: Iterable[Row | None]) -> Iterator[list[Row]]:
    """Rows in lists that are answered together; None ends a list."""
    block, characters = [], 0
    for row in itertools.chain(rows, [None]):
        if row:
            block.append(row)
            characters += len(row.text)
        if block and (not row or len(block) == BLOCK or characters >= BLOCK_CHARACTERS):
            yield block
            block, characters = [], 0


def _rows(arguments: list[str], option: str) -> Iterator[Row | None]:
    """Each argument is a file by its name, - for the lines of standard input, or else a text."""
    for argument in arguments:
        if argument == "-":
            yield from _standard_input()
        elif os.path.exists(argument):
            yield from Dataset(argument, option=option).read()
        elif _names_a_file(argument):
            hint = "a text like that goes through standard input, -"
            raise UserError(f"{option} {argument}: no such file ({hint})")
        else:
            yield make_row(option, [("text", argument)])


def _names_a_file(text: str) -> bool:
    """Whether a text that is no file looks like the name of one, and not like a review.

    "my reviews.csv", "review.text", "no/such/file" do; "and/or", "10/10", "Fine...but long" do not.
    """
    words = len(text.split())
    ending = re.search(r"(?<![.\s])\.([a-z][a-z0-9]{1,4})$", text, re.IGNORECASE)
    if ending and f".{ending[1].lower()}" in SUFFIXES:
        return True
    if words > 4:  # a sentence, which may end with "www.imdb.com"
        return False
    if ending:  # "Loved it.Great" lacks a space
        return words == 1 or ending[1] in (ending[1].lower(), ending[1].upper())
    folder, _, name = text.rpartition("/")
    deep = words == 1 and ("/" in folder or not name) and not re.fullmatch(r"[\d/]+", text)
    folder = os.path.expanduser(folder) or "/"
    return text in PACKAGED or "/" in text and (deep or os.path.isdir(folder))


def _standard_input() -> Iterator[Row | None]:
    """Its lines, a very long one in pieces; None where the next line may take long."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    stream, chunk, rest = sys.stdin.buffer, b"more", ""
    while chunk:
        chunk = stream.read1(1 << 20)  # what is there, at least a byte, or at the end none
        try:
            *lines, rest = (rest + decoder.decode(chunk, final=not chunk)).split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not UTF-8 text ({error.reason})") from error
        if not chunk or len(rest) >= LONGEST_LINE:
            lines, rest = [*lines, rest], ""
        for line in filter(str.strip, lines):
            yield make_row("standard input", [("text", line.strip())])
        with contextlib.suppress(io.UnsupportedOperation):  # not a file of the system: all is there
            if not (rest and select.select([stream], [], [], MOMENT)[0]):
                yield None


def _latest_run(out: Path) -> str:
    """The run of finetune.py that ended last."""
    finished = [
        path for path in out.rglob("metrics.json") if "scratch" not in path.relative_to(out).parts
    ]
    if not finished:
        raise UserError(f"no fine-tuned model in {out}: train one first, or name one with --model")
    return str(max(finished, key=lambda path: path.stat().st_mtime).parent)
