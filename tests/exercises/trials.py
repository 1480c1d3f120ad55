"""What a learner's code changes in practice: something small, trained or asked, with it and without.

Each trial gives a row {column: value} for the code that stands in the project when it is called.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from minitune.adapters import adapter_parameters
from minitune.calibration import figures, match_prior
from minitune.checkpoint import load_masked_lm, load_tokenizer, read_config
from minitune.classification import Classification, Examples, TokenizedTexts
from minitune.corpus import Corpus
from minitune.data import Dataset, Reviews
from minitune.explain import Question, explain
from minitune.initialization import start_with_frequencies, start_with_neighbours
from minitune.lora import TARGETS, lora_parameters
from minitune.merging import merge
from minitune.methods import METHODS, all_parameters, build
from minitune.model import BertConfig, BertForMaskedLM, BertForSequenceClassification
from minitune.optimizer import Optimizer, one_cycle
from minitune.pretraining import MaskedLanguageModelling
from minitune.prompting import TEMPLATES, WORDS, FillMask, Prompt
from minitune.support.errors import UserError
from minitune.support.model_names import default_model, find_model
from minitune.support.runtime import Runtime
from minitune.training import evaluate
from tests.exercises.checks import Functions, in_place, lessons_own
from tests.exercises.table import Exercise

DATA = "rotten_tomatoes"
RUNTIME = Runtime(torch.device("cpu"), "fp32")
PRETRAINING_STEPS = 150
ROWS, EPOCHS = 512, 2  # of fine-tuning
A_LITTLE = "a little is rounding, or other random draws; more is the code"
UNLABELLED = 256  # rows, of which the prior is matched
EXPLAINED = ["An unforgettable film, and great fun.", "It is long, loud and utterly dull."]
SMALL = BertConfig(
    vocab_size=4096,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=512,
    max_position_embeddings=64,
)


def lines(exercise: Exercise, functions: Functions) -> Iterator[str]:
    """A table: the lesson's own code, and the learner's."""
    trial = TRIALS[exercise.name]()
    yield trial.about
    rows = []
    for whose, code in (("the lesson's", lessons_own(exercise)), ("yours", functions)):
        with in_place(code), torch.random.fork_rng():
            torch.manual_seed(0)
            started = time.monotonic()
            row = trial.run()
            row["seconds"] = f"{time.monotonic() - started:.1f}"
        if not rows:
            yield " " * 14 + "".join(f"{column:>20}" for column in row)
        rows.append(row)
        yield f"{whose:14}" + "".join(f"{value:>20}" for value in row.values())
    same = all(value == rows[0][column] for column, value in rows[1].items() if column != "seconds")
    yield "the same figures" if same else f"the figures differ; {A_LITTLE}"


class Pretraining:
    """A small BERT from random weights guesses masked words, for some steps."""

    def __init__(self, attention: str = "sdpa"):
        self.attention = attention
        self.corpus = Corpus.open(Dataset(DATA), None, SMALL.vocab_size)
        options = {"max_len": 64, "batch_tokens": 2048, "rate": 0.15, "whole_word": False}
        # Validation rows are masked here, by the lesson's own code.
        self.task = MaskedLanguageModelling(self.corpus, seed=0, **options)
        self.about = (
            f"{PRETRAINING_STEPS} steps of pretraining on {DATA}, {SMALL.num_hidden_layers} layers of "
            f"{SMALL.hidden_size}, attention {attention}. The loss in nats a masked word, on\n"
            f"validation rows; words by their frequency alone: {self.task.unigram:.2f}"
        )

    def run(self) -> dict[str, str]:
        """Train, and evaluate."""
        config = replace(SMALL, vocab_size=self.corpus.tokenizer.vocab_size)
        model = BertForMaskedLM(config, self.attention)
        start_with_neighbours(model.bert)
        start_with_frequencies(model.head, torch.from_numpy(self.corpus.unigrams))
        train(model, self.task, Optimizer(model, "muon", 0.01, 1e-3, 0.01), PRETRAINING_STEPS)
        found = evaluate(model, self.task.validation_batches(quick=False), RUNTIME)
        return {"loss": f"{found['loss']:.3f}", "words guessed": f"{found['accuracy']:.1%}"}


def train(model: nn.Module, task: Any, optimizer: Optimizer, steps: int) -> None:
    """What training.Trainer does, without checkpoints."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for step, batch in enumerate(islice(task.batches(0), steps)):
        inputs, labels = batch.to(RUNTIME.device)
        loss, _ = task.loss(model, inputs, labels)
        (loss / len(batch)).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.set_rate(one_cycle(step, steps))
        for part in optimizer.parts:
            part.step()
        optimizer.zero_grad()


class FineTuning:
    """A method of fine-tuning on few rows."""

    def __init__(self, method: str, trained: Callable[[nn.Module], list[str]], **options: Any):
        """`trained` gives the names of what the method trains."""
        self.method, self.trained, self.options = method, trained, options
        name, why = default_model()
        self.source, reviews = find_model(name), Reviews.load(Dataset(DATA))
        tokenizer = load_tokenizer(self.source, read_config(self.source))
        self.names, examples = reviews.names, {}
        for split, count in (("train", ROWS), ("validation", len(reviews.labels["validation"]))):
            rows = reviews.balanced_subset(split, count, seed=0)
            texts = TokenizedTexts([reviews.texts[split][i] for i in rows], tokenizer, 64)
            examples[split] = Examples(texts, reviews.labels[split][torch.from_numpy(rows)])
        options = {"batch_tokens": 1024, "epochs": EPOCHS, "seed": 0}
        self.task, self.tokenizer = Classification(*examples.values(), **options), tokenizer
        self.training = (
            f"finetune.py --method {method} on {ROWS} rows of {DATA}, {EPOCHS} epochs, from {name} "
            f"({why})"
        )
        self.about = f"{self.training};\naccuracy and loss on {len(texts.ids)} validation rows"

    def train(self) -> BertForSequenceClassification:
        """The model, trained."""
        method = METHODS[self.method]
        model = build(self.method, self.source, self.names, **self.options)
        trained = set(self.trained(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        lr = method.lr(model.config.hidden_size)
        optimizer = Optimizer(model, method.optimizer, lr, method.adamw * lr, 0.01)
        train(model, self.task, optimizer, self.task.steps)
        return model

    def run(self) -> dict[str, str]:
        """Train, and evaluate."""
        model = self.train()
        found = evaluate(model, self.task.validation_batches(quick=False), RUNTIME)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        share = trained / sum(p.numel() for p in model.parameters())
        row = {"accuracy": f"{found['accuracy']:.1%}", "loss": f"{found['loss']:.3f}"}
        row["trained"] = f"{trained:,} ({share:.1%})"
        if self.method == "lora":
            merge(model)
            found = evaluate(model, self.task.validation_batches(quick=False), RUNTIME)
            row["merged"] = f"{found['accuracy']:.1%}"
        return row


class Asking:
    """A prompt on validation rows; nothing is trained."""

    def __init__(self):
        name, why = default_model()
        source = find_model(name)
        self.model, has_head = load_masked_lm(source, "sdpa")
        if not has_head:
            raise UserError(f"{name} cannot fill blanks: pretrain a model first (python train.py)")
        tokenizer = load_tokenizer(source, self.model.config)
        self.fill_mask = FillMask(self.model.eval(), tokenizer, RUNTIME)
        reviews = Reviews.load(Dataset(DATA))
        self.labels = reviews.labels["validation"]
        self.texts = tokenizer.encode(reviews.texts["validation"])
        rows = torch.randperm(len(reviews.texts["train"]))[:UNLABELLED].tolist()
        self.unlabelled = tokenizer.encode([reviews.texts["train"][i] for i in rows])
        self.about = (
            f"{len(self.texts)} validation rows of {DATA}, asked with {TEMPLATES[0]!r}; model: {name} "
            f"({why}).\nThe prior is that of {len(self.unlabelled)} unlabelled training rows"
        )

    def run(self) -> dict[str, str]:
        """Ask, and ask with the prior matched."""
        prompt = Prompt(TEMPLATES[0], WORDS, self.fill_mask, 64)
        scores = prompt.scores(self.texts)
        matched = scores + match_prior(prompt.scores(self.unlabelled))
        names = prompt.verbalizer.names
        before, after = (figures(each, self.labels, names) for each in (scores, matched))
        return {
            "accuracy": f"{before['accuracy']:.1%}",
            "most answers": f"{before['majority_share']:.0%} {before['majority_answer']}",
            "prior matched": f"{after['accuracy']:.1%}",
            f"mean p({names[1]})": f"{matched.softmax(-1).mean(0)[1]:.3f}",
        }


class Explaining:
    """Why a fine-tuned model gives its answers; it is trained once, by the lesson's own code."""

    def __init__(self):
        tuned = FineTuning("full", all_parameters)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = tuned.train().eval()
        self.questions = [
            Question(model, tuned.tokenizer, tuned.tokenizer.frame(ids), tuned.names)
            for ids in tuned.tokenizer.encode(EXPLAINED)
        ]
        listed = "\n".join(
            f"  {q.label_names[0]}: {text}"
            for q, text in zip(self.questions, EXPLAINED, strict=True)
        )
        self.about = f"{tuned.training}.\nWhy these answers?\n{listed}"

    def run(self) -> dict[str, str]:
        """The word that adds most, and by how much the sum is off."""
        row = {}
        for number, question in enumerate(self.questions, start=1):
            found = explain(question)
            most, word = max(zip(found.attributions, found.words, strict=True))
            row |= {
                f"most in {number}": f"{word} {most:+.2f}",
                f"sum {number} is off": f"{found.error:.1%}",
            }
        return row


TRIALS: dict[str, Callable] = {
    "masking": Pretraining,
    "attention": lambda: Pretraining("reference"),
    "packed": lambda: Pretraining("reference"),
    "online_softmax": lambda: Pretraining("tiled"),
    "layer": Pretraining,
    "masked_loss": Pretraining,
    "adapter": lambda: FineTuning(
        "adapter", lambda model: adapter_parameters(model), adapter_size=32
    ),
    "lora": lambda: FineTuning(
        "lora", lora_parameters, lora_targets=",".join(TARGETS), lora_rank=8, lora_alpha=16.0
    ),
    "prompt": Asking,
    "gradients": Explaining,
}
