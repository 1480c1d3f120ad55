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

from minitune.adapters import AdapterSwitch
from minitune.attention import resolve_backend
from minitune.batching import reading_tokens, sorted_batches
from minitune.calibration import CALIBRATIONS, mean_log_probabilities
from minitune.checkpoint import (
    Trained,
    check_max_len,
    fill,
    find_model,
    load_classifier,
    load_for_classification,
    read_config,
)
from minitune.classification import Sequences
from minitune.data import SUFFIXES, Dataset, Row, label_index
from minitune.features import FeatureClassifier
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
    """A fine-tuned model with its tokenizer and label names, ready for new texts."""

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, labels: dict[int, str], max_len: int
    ):
        self.model, self.tokenizer, self.labels, self.max_len = (
            model.eval(),
            tokenizer,
            labels,
            max_len,
        )

    @classmethod
    def load(cls, name: str, runtime: Runtime, attention: str = "auto") -> "Classifier":
        """From the directory of any fine-tuning run, or a BertForSequenceClassification directory or id."""
        directory = find_model(name)
        trained = None
        if (directory / "trained.json").is_file():
            trained = Trained.read(directory)
        base = trained.find_base(directory) if trained else directory
        head_size = read_config(base).head_size
        attention = resolve_backend(attention, runtime.device, runtime.dtype, head_size)
        if not trained:
            model = load_classifier(directory, attention)
            settings, max_len = directory / "settings.json", model.config.max_position_embeddings
            if settings.is_file():
                max_len = read_json(settings).get("max_len", max_len)
            check_max_len(max_len, model.config, settings)
            return cls(model, Tokenizer.load(directory), model.config.id2label, max_len)
        model = load_for_classification(base, trained.labels, attention)
        check_max_len(trained.max_len, model.config, directory / "trained.json")
        if trained.method == "adapter":
            switch = AdapterSwitch(model)
            switch.add(name, trained.adapter_modules(model.config, directory), trained.labels)
            model = switch.use(name)
        else:
            model = FeatureClassifier(model.bert, len(trained.labels))
            try:
                fill(model.head, "head", trained.tensors)
            except RuntimeError as error:
                raise UserError(
                    f"{directory}/trained.safetensors does not fit its description"
                ) from error
        return cls(model, Tokenizer.load(base), trained.labels, trained.max_len)

    def predict(
        self, texts: Iterable[str], runtime: Runtime, batch_tokens: int
    ) -> Iterator[Prediction]:
        """One prediction a text, in the order of the texts; read and answered a block at a time."""
        self.model.to(runtime.device)
        texts = iter(texts)
        while block := list(itertools.islice(texts, BLOCK)):
            sequences = Sequences(block, self.tokenizer, self.max_len)
            probabilities = torch.empty(len(block), len(self.labels))
            # One context for all batches: while it lasts, autocast keeps what it has made of
            # weights that require gradients (of others, and under inference_mode, it keeps
            # nothing).
            with torch.no_grad(), runtime.autocast():
                for indices in sorted_batches(sequences.lengths, batch_tokens):
                    logits = self.model(sequences.select(indices).pack().to(runtime.device))
                    probabilities[torch.from_numpy(indices)] = logits.float().softmax(-1).cpu()
            for text, p, truncated in zip(
                block, probabilities.tolist(), sequences.truncated, strict=True
            ):
                label = max(range(len(p)), key=p.__getitem__)
                by_name = {self.labels[i]: p[i] for i in range(len(p))}
                yield Prediction(text, self.labels[label], by_name, truncated)


class Ensemble:
    """Several prompts, each calibrated, that answer together: the mean of their log-probabilities."""

    def __init__(self, prompts: list[Prompt], calibration: str, unlabelled: list[list[int]]):
        """`calibration` is a key of CALIBRATIONS."""
        self.prompts = prompts
        self.names = prompts[0].words.names  # of the labels
        self.biases = [CALIBRATIONS[calibration](prompt, unlabelled) for prompt in prompts]

    def log_probabilities(self, texts: list[list[int]]) -> Tensor:
        """(N, L) of the labels of these texts."""
        pairs = zip(self.prompts, self.biases, strict=True)
        return mean_log_probabilities([prompt.scores(texts) + bias for prompt, bias in pairs])

    def predict(self, texts: Iterable[str], count: int) -> Iterator["PromptPrediction"]:
        """One prediction a text, in the order of the texts, with `count` of the words wanted at the mask.

        Read and answered a block at a time. The words are those in the blank of the first template.
        """
        first, texts = self.prompts[0], iter(texts)
        room = min(prompt.room for prompt in self.prompts)
        while block := list(itertools.islice(texts, BLOCK)):
            ids = first.fill_mask.tokenizer.encode(block)
            probabilities = self.log_probabilities(ids).exp().tolist()
            wanted = first.most_probable_words(ids, count)
            for text, own, p, words in zip(block, ids, probabilities, wanted, strict=True):
                by_name = {name: p[i] for i, name in self.names.items()}
                label = max(by_name, key=by_name.__getitem__)
                yield PromptPrediction(text, label, by_name, len(own) > room, dict(words))


@dataclass
class PromptPrediction(Prediction):
    """The answer for one text, and what the model would have liked to write."""

    words: dict[str, float]  # with their probabilities, the most probable first

    def cells(self) -> dict[str, str]:
        """Also the words."""
        *rest, text = super().cells().items()
        return dict([*rest, ("words", in_words(self.words.items())), text])


def label_new_reviews(args: argparse.Namespace) -> None:
    """`finetune.py --predict`, from its options to the last answer."""
    runtime = Runtime.start(args.device, args.precision)
    name = args.model or _latest_run(args.out)
    classifier = Classifier.load(name, runtime, args.attention)
    say(
        f"model: {name}; labels: {', '.join(classifier.labels.values())}; precision: {runtime.precision}"
    )

    def predict(texts: Iterator[str]) -> Iterator[Prediction]:
        batch_tokens = args.batch_tokens or reading_tokens(runtime.device)
        return classifier.predict(texts, runtime, batch_tokens)

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
