"""Fine-tuned models on disk, and new reviews labelled with them.

Full fine-tuning leaves a whole BERT directory (checkpoint.py). The other methods leave what they
trained and what it belongs to:

    trained.safetensors   adapters, LayerNorms and head; or the head alone
    trained.json          method, label names, longest text, and path and SHA-256 of the base model
"""

import argparse
import csv
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

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
from minitune.classification import Sequences
from minitune.data import SUFFIXES, Dataset, Row, label_index
from minitune.finetuning import load_trained
from minitune.prompting import Prompt, in_words
from minitune.support.errors import UserError
from minitune.support.runs import read_json
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer

BLOCK = 2048  # texts that are in memory at a time


@dataclass
class Prediction:
    """The answer for one text."""

    text: str
    label: str
    probabilities: dict[str, float]
    truncated: bool

    def cells(self) -> dict[str, str]:
        """The columns of its line in a table, the text last since it is the longest."""
        probability, truncated = (
            f"{self.probabilities[self.label]:.4f}",
            str(self.truncated).lower(),
        )
        return {
            "label": self.label,
            "probability": probability,
            "truncated": truncated,
            "text": self.text,
        }


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
        """From the directory of any fine-tuning run, or a BertForSequenceClassification directory or id.

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

    def predict(
        self, texts: Iterable[str], batch_tokens: int | None = None
    ) -> Iterator[Prediction]:
        """One prediction a text, in the order of the texts; read and answered a block at a time."""
        batch_tokens = batch_tokens or reading_tokens(self.runtime.device)
        texts = iter(texts)
        while block := list(itertools.islice(texts, BLOCK)):
            sequences = Sequences(block, self.tokenizer, self.max_len)
            probabilities = torch.empty(len(block), len(self.labels))
            # One context for all batches: while it lasts, autocast keeps the weights that it has
            # converted (those that require gradients, and not under inference_mode).
            with torch.no_grad(), self.runtime.autocast():
                for indices in sorted_batches(sequences.lengths, batch_tokens):
                    logits = self.model(sequences.select(indices).pack().to(self.runtime.device))
                    probabilities[torch.from_numpy(indices)] = logits.float().softmax(-1).cpu()
            if not probabilities.isfinite().all():
                raise UserError("the model's answers are no numbers: its weights must be damaged")
            for text, p, truncated in zip(
                block, probabilities.tolist(), sequences.truncated, strict=True
            ):
                label = max(range(len(p)), key=p.__getitem__)
                by_name = {self.labels[i]: p[i] for i in range(len(p))}
                yield Prediction(text, self.labels[label], by_name, truncated)


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

    def predict(self, texts: Iterable[str], count: int) -> Iterator["PromptPrediction"]:
        """One prediction a text, in the order of the texts, read a block at a time.

        With the `count` most probable words in the blank of the first template.
        """
        first, texts = self.prompts[0], iter(texts)
        room = min(prompt.room for prompt in self.prompts)
        while block := list(itertools.islice(texts, BLOCK)):
            ids = first.fill_mask.tokenizer.encode(block)
            probabilities = self.log_probabilities(ids).exp().tolist()
            words = first.most_probable_words(ids, count)
            for text, tokens, p, likely in zip(block, ids, probabilities, words, strict=True):
                by_name = dict(zip(self.names.values(), p, strict=True))
                label = max(by_name, key=by_name.__getitem__)
                yield PromptPrediction(text, label, by_name, len(tokens) > room, dict(likely))


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
    say(
        f"model: {name}; labels: {', '.join(classifier.labels.values())}; precision: {runtime.precision}"
    )

    def predict(texts: Iterator[str]) -> Iterator[Prediction]:
        return classifier.predict(texts, args.batch_tokens)

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

    `arguments` are texts, files or -, given to `option`; `cut` says what happened to texts that are
    too long.
    """
    expected: list[str | None] = []  # the labels of the rows, where they come with any

    def texts() -> Iterator[str]:
        for number, row in enumerate(_rows(arguments, option), start=1):
            index = label_index(row.label, labels, numbers_too=True) if row.label else None
            if row.label and index is None:
                names = ", ".join(labels.values())
                raise UserError(
                    f"row {number}: the label {row.label} is none of the model's: {names}"
                )
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
        elif os.path.isfile(argument) or (
            Path(argument).suffix in SUFFIXES and " " not in argument
        ):
            yield from Dataset(argument, option=option).read()
        else:
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
    finished = [
        path for path in out.rglob("metrics.json") if "scratch" not in path.relative_to(out).parts
    ]
    if not finished:
        raise UserError(f"no fine-tuned model in {out}: train one first, or name one with --model")
    return str(max(finished, key=lambda path: path.stat().st_mtime).parent)
