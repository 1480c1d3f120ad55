"""The jobs as minitune does them: its own loop, tasks and models, only the batches are given."""

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minitune.adapters import insert_adapters
from minitune.attention import resolve_backend
from minitune.batching import PackedBatch, reading_tokens
from minitune.checkpoint import (
    load_classifier,
    load_masked_lm,
    load_tokenizer,
    read_config,
    to_bert,
)
from minitune.classification import Classification, Examples, TokenizedTexts
from minitune.features import FeatureClassifier, Features, extract
from minitune.methods import METHODS, load_trained
from minitune.model import MeanPooler
from minitune.optimizer import Optimizer
from minitune.peft_files import PeftDirectory, peft_tensors
from minitune.prediction import Classifier
from minitune.pretraining import MaskedBatch, MaskedLanguageModelling
from minitune.support.runs import Run
from minitune.support.runtime import Runtime
from minitune.training import Trainer
from tests.benchmarks.peers.problem import ADAPTER_SIZE, EPOCHS, LABELS, LR, RATE, Problem

CPU = torch.device("cpu")


class GivenBatches(Classification):
    """The task of finetune.py over given batches; next to nothing is evaluated."""

    def __init__(self, examples: Examples, batches: list[list[int]], epochs: int = 1):
        few = examples if epochs > 1 else examples.select(np.arange(2))
        super().__init__(examples, few, batch_tokens=1 << 16, epochs=1, seed=0)
        self.given = [np.array(rows) for rows in batches] * epochs
        self.epoch_ends = [len(self.given)]

    def batches(self, first_step: int) -> Iterator[Examples]:
        yield from map(self.train.select, self.given[first_step:])


class GivenBlanks(MaskedLanguageModelling):
    """The task of train.py over given sequences; nothing is evaluated."""

    def __init__(self, problem: Problem, tokenizer):
        self.tokenizer, self.rate, self.summary_weight, self.baseline = tokenizer, RATE, 0.0, ""
        self.rows = [torch.tensor(ids) for ids in problem.ids]
        self.given = problem.grouped

    def batches(self, first_step: int) -> Iterator[MaskedBatch]:
        generator = torch.Generator().manual_seed(0)
        for rows in self.given[first_step:]:
            yield self.mask(
                [self.rows[row] for row in rows], generator, self.rate, whole_word=False
            )

    def evaluation_due(self, step: int, steps: int) -> bool:
        return False

    def validation_batches(self, quick: bool) -> list[MaskedBatch]:
        return []


class Ours:
    """One job, ready to be timed."""

    def __init__(self, problem: Problem, tuned: bool):
        self.problem, self.runtime = problem, Runtime.start("cpu", problem.precision)
        head_size = read_config(problem.directory).head_size
        self.attention = resolve_backend("auto", self.runtime.device, self.runtime.dtype, head_size)
        self.run = {"feature": self.train_on_features, "label": self.label}.get(
            problem.job, self.train
        )
        if problem.job == "mlm":
            self.model, _ = load_masked_lm(problem.directory, self.attention)
            self.tokenizer = load_tokenizer(problem.directory, self.model.config)
            self.task = GivenBlanks(problem, self.tokenizer)
            return
        self.model = load_classifier(problem.directory, self.attention)
        self.tokenizer = load_tokenizer(problem.directory, self.model.config)
        if problem.job == "adapter":
            insert_adapters(self.model.bert, ADAPTER_SIZE)
            adapters = load_file(problem.directory / "adapters.safetensors")
            self.model.load_state_dict(adapters, strict=False)
        if problem.job == "lora":
            folder = problem.directory / "lora"
            saved = PeftDirectory.read(folder)
            self.model = load_trained(saved, folder, problem.directory, self.attention)
        method = METHODS[problem.job if problem.job in ("adapter", "lora") else "full"]
        chosen = set(method.trained(self.model))
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in chosen)
        sequences = TokenizedTexts(problem.texts, self.tokenizer, problem.max_len)
        assert [row.tolist() for row in sequences.ids] == problem.ids
        self.examples = Examples(sequences, torch.tensor(problem.labels))
        self.task = GivenBatches(self.examples, problem.grouped)

    def check(self) -> dict[str, Tensor]:
        """Loss and gradients of the first batch in float32, under BERT's names; or logits."""
        self.model.eval()
        if self.problem.job in ("label", "feature"):
            inputs, _ = self.examples.select(np.array(self.problem.grouped[0])).to(CPU)
            with torch.no_grad():
                return {"logits": self.model(*inputs)}
        if self.problem.job == "mlm":
            tokens, positions, labels = self.problem.blanks
            lengths = [len(self.problem.ids[row]) for row in self.problem.grouped[0]]
            batch = PackedBatch.from_sequences(list(tokens.split(lengths)))
            batch = MaskedBatch(batch, positions, labels)
        else:
            batch = self.examples.select(np.array(self.problem.grouped[0]))
        loss = self.task.loss(self.model, *batch.to(CPU))[0] / len(batch)
        loss.backward()
        trained = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        gradients = to_bert({name: p.grad for name, p in trained.items()})
        if self.problem.job == "lora":
            weights = {name: p.data for name, p in trained.items()}
            for p in trained.values():
                p.data = p.grad
            gradients = peft_tensors(self.model)  # views: of the gradients here
            for name, p in trained.items():
                p.data = weights[name]
        self.model.zero_grad()
        return {"loss": loss.detach()} | gradients

    def _trainer(self, learner: nn.Module, task, runtime: Runtime, folder: str) -> Trainer:
        optimizer = Optimizer(learner, "adamw", LR, LR, 0.01)
        run = Run(Path(folder))
        run.start({})
        trainer = Trainer(
            learner,
            optimizer,
            task,
            run,
            runtime,
            seed=0,
            warmup=0.1,
            save_minutes=math.inf,
        )
        trainer.steps = len(task.given)
        return trainer

    def train(self) -> float:
        """Seconds of training, saving not among them."""
        self.runtime.cast_frozen(self.model.bert)  # as finetune.py does
        if self.problem.job == "adapter":
            self.model.pooler = (
                MeanPooler()
            )  # what finetune.py puts there; for the check it was BERT's
        with tempfile.TemporaryDirectory() as folder:
            trainer = self._trainer(self.model, self.task, self.runtime, folder)
            trainer.train()
        return trainer.seconds

    def train_on_features(self) -> float:
        """Seconds for reading every text once and training a head on what was read."""
        model = FeatureClassifier(self.model.bert, len(LABELS)).requires_grad_(False)
        model.head.requires_grad_(True)
        self.runtime.cast_frozen(model.bert)  # as finetune.py does
        with tempfile.TemporaryDirectory() as folder:
            started, prefix = time.perf_counter(), Path(folder) / "train"
            matrix, _ = extract(model.bert, self.examples.inputs, prefix, self.runtime)
            model.head.standardise(matrix)
            seconds = time.perf_counter() - started
            features = Examples(Features(matrix), self.examples.labels)
            task = GivenBatches(features, self.problem.grouped, EPOCHS)
            trainer = self._trainer(model.head, task, Runtime.start("cpu", "fp32"), folder)
            trainer.train()
        return seconds + trainer.seconds

    def label(self) -> float:
        """Seconds from texts to labels."""
        parts = self.model, self.tokenizer, LABELS, self.problem.max_len, self.runtime
        classifier = Classifier(*parts)
        started = time.perf_counter()
        texts, budget = self.problem.texts, reading_tokens(self.runtime.device)
        answers = classifier.predict(texts, budget)
        assert len(answers) == len(texts)
        return time.perf_counter() - started
