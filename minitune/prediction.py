"""A fine-tuned model, loaded from disk, answers for new texts.

    for answer in Classifier.load("runs/finetune/adapter").predict(["good fun"]):
        print(answer.label, answer.probabilities)

Full fine-tuning saves a whole model (checkpoint.py). Other methods save what they trained, and name
the pretrained base model that it belongs to (trained.py). A Classifier is loaded from either.
"""

import reprlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minitune.attention import resolve_backend
from minitune.bag_of_words import Bag
from minitune.batching import reading_tokens, sorted_batches
from minitune.checkpoint import check_max_len, load_classifier, load_tokenizer, read_config
from minitune.classification import BEGINNING_SHARE, TokenizedTexts
from minitune.cloze import ClozeClassifier, OneTemplate
from minitune.explain import Explanation, Question, explain
from minitune.methods import load_trained
from minitune.peft_files import read_trained
from minitune.support import explanations
from minitune.support.answers import Prediction
from minitune.support.errors import UserError, plural
from minitune.support.model_names import find_model
from minitune.support.runs import read_json
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer


@dataclass
class ExplainedPrediction(Prediction):
    """The answer for one text, and what each of its words adds to it."""

    explanation: Explanation

    def show(self, header: bool) -> str:
        """The words in colours where stdout is a terminal, else a table of those that add most."""
        why = self.explanation
        first = f"{self.label} ({self.probabilities[self.label]:.1%}) and not {why.other}"
        last = f"completeness error {why.error:.2%} with {plural(why.steps, 'step')}"
        last += "" if why.trusted else ": too large, this explanation is not to be trusted"
        if sys.stdout.isatty():
            words = explanations.coloured(why.words, why.attributions)
            last = f"blue: for {self.label}; orange: for {why.other}; {last}"
        else:
            difference = f"logit of {self.label} above that of {why.other}"
            sums = {"(no words, each a [MASK])": why.without_words, difference: why.difference}
            words = explanations.word_table(why.words, why.attributions, sums)
        return f"{first}\n{words}\n{last}\n"


def explained(
    text: str,
    truncated: bool,
    question: Question,
    labels: dict[int, str],
    temperature: float = 1.0,
) -> ExplainedPrediction:
    """The answer to the question about a text, and why."""
    probabilities = (question.logits / temperature).softmax(-1).tolist()
    by_name = {labels[i]: p for i, p in enumerate(probabilities)}
    label, _ = question.label_names
    return ExplainedPrediction(text, label, by_name, truncated, explain(question))


class Classifier:
    """A fine-tuned model with its tokenizer and label names, ready for new texts."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        labels: dict[int, str],
        max_len: int,
        runtime: Runtime,
        base_hash: str = "",
        source: Path | None = None,
        bag: Bag | None = None,
    ):
        """`source`: the directory of the pretrained weights, or of all; `base_hash`: of the former.

        `base_hash` is empty where all weights were trained. `bag` answers together with the model.
        """
        self.model = model.eval().to(runtime.device)
        self.tokenizer, self.labels, self.max_len = tokenizer, labels, max_len
        self.runtime, self.base_hash, self.source, self.bag = runtime, base_hash, source, bag

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
        Raises UserError where there is no such model, or its files are damaged.
        """
        runtime = runtime or Runtime.start()
        directory = find_model(name)
        trained = read_trained(directory)
        if trained is None and base is not None:
            raise UserError(f"--base: {directory} holds a whole model and needs no other")
        source = trained.find_base(directory, base) if trained else directory
        config = read_config(source)
        attention = resolve_backend(attention, runtime.device, runtime.dtype, config.head_size)
        if trained is None:
            model = load_classifier(directory, attention)
            labels, base_hash = model.config.id2label, ""
            where, max_len = directory / "settings.json", config.max_position_embeddings
            if where.is_file():
                max_len = read_json(where).get("max_len", max_len)
        else:
            model = load_trained(trained, directory, source, attention)
            labels, base_hash = trained.labels, trained.base_hash
            where, max_len = directory / trained.file, trained.max_len
        check_max_len(max_len, config, where)
        # Where minitune trained on a base, without markup; else the files of the model say.
        remove_markup = trained is not None and not trained.foreign
        tokenizer = load_tokenizer(source, config, remove_markup)
        bag = Bag.load(directory, len(labels))
        return cls(model, tokenizer, labels, max_len, runtime, base_hash, source, bag)

    def predict(self, texts: list[str], batch_tokens: int | None = None) -> list[Prediction]:
        """One prediction a text, in the order of the texts, `batch_tokens` read at a time."""
        sequences = self.read(texts)
        logits = torch.empty(len(texts), len(self.labels))
        budget = batch_tokens or reading_tokens(self.runtime.device)
        # One context for all batches: autocast converts the weights once and keeps them until it
        # ends. (It keeps none under inference_mode.)
        with torch.no_grad(), self.runtime.autocast():
            for indices in sorted_batches(sequences.lengths, budget):
                batch = sequences.select(indices).pack().to(self.runtime.device)
                logits[torch.from_numpy(indices)] = self.model(batch).float().cpu()
        logits = self.bag.together(logits, texts) if self.bag else logits / self.model.temperature
        probabilities = logits.softmax(-1)
        if not probabilities.isfinite().all():
            raise UserError("the model's answers are no numbers: its weights must be damaged")
        answers = []
        best = logits.argmax(-1).tolist()  # two probabilities may be rounded to the same number
        rows = zip(texts, best, probabilities.tolist(), sequences.truncated, strict=True)
        for text, label, row, truncated in rows:
            by_name = {self.labels[i]: p for i, p in enumerate(row)}
            answers.append(Prediction(text, self.labels[label], by_name, truncated))
        return answers

    def read(self, texts: list[str]) -> TokenizedTexts:
        """The texts as the model reads them."""
        beginning = getattr(self.model, "beginning", BEGINNING_SHARE)
        return TokenizedTexts(texts, self.tokenizer, self.max_len, beginning)

    def question(self, ids: np.ndarray, batch_tokens: int | None = None) -> Question:
        """Why does the text of these ids have its label? UserError if no word of it is known.

        Of a run of `prompt` the first template is asked.
        """
        model, ids = self.model, ids.tolist()
        if isinstance(model, ClozeClassifier):
            ids, position = model.cloze(ids[1:-1], 0)
            model = OneTemplate(model, 0, position)
        return Question(model, self.tokenizer, ids, self.labels, batch_tokens)

    def explain(self, text: str, batch_tokens: int | None = None) -> ExplainedPrediction:
        """The prediction for a text, and what each of its words adds to it, in float32."""
        inputs = self.read([text])
        try:
            question = self.question(inputs.ids[0], batch_tokens)
        except UserError as error:
            raise UserError(f"{reprlib.repr(text)}: {error}") from error
        temperature = self.model.temperature
        return explained(text, inputs.truncated[0], question, self.labels, temperature)


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


def predict_together(
    classifiers: dict[str, Classifier], texts: list[str], names: list[str]
) -> list[Prediction]:
    """One prediction a text, by the classifier that `names` has for it, in the order of the texts.

    The texts of one classifier are read together. UserError for a name that none has, or where
    there is not one name a text.
    """
    if len(names) != len(texts):
        raise UserError(f"{len(texts)} texts and {len(names)} names of classifiers")
    answers = dict.fromkeys(range(len(texts)))
    for name in dict.fromkeys(names):
        if name not in classifiers:
            raise UserError(f"no classifier is named {name}: there are {', '.join(classifiers)}")
        chosen = [i for i, its_name in enumerate(names) if its_name == name]
        predicted = classifiers[name].predict([texts[i] for i in chosen])
        answers |= zip(chosen, predicted, strict=True)
    return list(answers.values())
