"""Fine-tuning by one method, from pretrained weights to the accuracy on the test rows.

What a method trains, and at which rate, is a row of methods.METHODS. The steps are the same for
all: build the model, choose the rows, train, keep the best by validation, and score the test rows
once, at the end.
"""

import argparse
import copy
import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minitune.batching import reading_tokens
from minitune.checkpoint import save_model, weights_hash
from minitune.classification import Classification, Examples, TokenizedTexts
from minitune.cloze import UNLABELLED, ClozeClassifier
from minitune.data import SPLITS, Reviews
from minitune.features import FeatureClassifier, Features, extract
from minitune.methods import METHODS, build, describe_recipe, load_trained, options_of
from minitune.optimizer import LRMultipliers, Optimizer
from minitune.peft_files import METHODS_OF_PEFT, PeftDirectory
from minitune.self_training import both_views, taught_rows
from minitune.support.errors import plural
from minitune.support.model_names import find_model
from minitune.support.runs import Run, write_atomically, write_tensors
from minitune.support.runtime import Runtime
from minitune.temperature import fit_temperature, logits_of, save_answers, score
from minitune.tokenizer import Tokenizer
from minitune.trained import Trained
from minitune.training import Trainer

SOUP_SEEDS = 1000  # between the seeds of trainings that are averaged; --seeds counts by one


@dataclass
class Setup:
    """What all experiments of a command share."""

    args: argparse.Namespace
    settings: dict  # for settings.json
    source: Path  # the directory of the pretrained model
    start: Trained | None  # the run that args.model names, if it is to be trained on
    tokenizer: Tokenizer
    reviews: Reviews
    examples: dict[str, Examples]  # by split
    runtime: Runtime
    attention: str  # the backend
    ends: dict[str, Examples] = field(default_factory=dict)  # `examples` as a cloze has them
    teachers: dict[tuple, Tensor] = field(default_factory=dict)  # their answers, by known labels
    test_features: Tensor | None = None  # (N, F)
    offsets: Tensor | None = None  # of its templates, the same for all experiments

    def options(self, method: str) -> dict:
        """The options of a method."""
        return options_of(method, self.args)

    def build(self, method: str) -> nn.Module:
        """The model of a method, on the device, before training."""
        if self.start:
            directory = find_model(self.args.model)
            model = load_trained(self.start, directory, self.source, self.attention)
        else:
            options = self.options(method)
            model = build(method, self.source, self.reviews.names, self.attention, **options)
        self.runtime.cast_frozen(model.bert)
        return model.to(self.runtime.device)

    def read(self, model: ClozeClassifier) -> dict[str, Examples]:
        """The rows of each split as this model reads them: the ends of the texts."""
        if not self.ends:
            how = self.tokenizer, model.max_len, model.beginning
            for split in SPLITS:
                texts = TokenizedTexts(self.reviews.texts[split], *how)
                self.ends[split] = Examples(texts, self.reviews.labels[split])
            cut = sum(self.ends["train"].inputs.truncated) / len(self.ends["train"])
            words = f"{cut:.0%} of the training rows have over {model.max_len} tokens"
            self.runtime.log(f"as a cloze {words}; their end is kept")
        return self.ends

    def calibrate(self, model: ClozeClassifier) -> None:
        """Give the model its offsets, from training rows without a look at their labels."""
        if self.offsets is None:
            chosen = choose_unlabelled(self.read(model)["train"].inputs, self.args.seed)
            model.calibrate(chosen, self.runtime)
            self.offsets = model.offsets.clone()
        model.offsets.copy_(self.offsets)


@dataclass
class Experiment:
    """One method on one choice of training rows, and the directory of its run."""

    method: str
    train_examples: int | None  # None: all
    seed: int
    run: Run

    @property
    def description(self) -> dict:
        """What tells it from others, for settings.json."""
        return {key: value for key, value in vars(self).items() if key != "run"}


def fine_tune(experiment: Experiment, setup: Setup) -> dict:
    """One experiment: its metrics, which `run` holds too when all is done."""
    args, run, runtime, started = setup.args, experiment.run, setup.runtime, time.monotonic()
    method = METHODS[experiment.method]
    runtime.log(f"\n{experiment.method}: {method.summary}")
    if run.is_finished:
        run.clean_up()  # it may have been killed just before that
        runtime.log(f"{run.directory} is finished")
        return run.metrics
    runtime.reset_peak_memory()
    torch.manual_seed(experiment.seed)
    # Before the run starts: where the model's file is damaged, no directory is left behind.
    model = setup.build(experiment.method)
    if runtime.is_main:
        run.start(setup.settings | {"experiment": experiment.description})
    runtime.barrier()  # the directory is there

    examples = setup.examples
    if isinstance(model, ClozeClassifier):
        examples = setup.read(model)
        if setup.start is None:
            setup.calibrate(model)
    texts = examples["train"].inputs
    learner, examples, reading = model, choose_rows(experiment, setup, examples), None
    labelled = len(examples["train"])
    if args.unlabelled:
        known = known_labels(experiment, setup)
        examples |= taught_rows(texts, ask_teacher(experiment, setup, known, started), known)
    if isinstance(model, FeatureClassifier):  # each text is read once, and the head alone trains
        learner, (examples, reading) = model.head, read_features(model, examples, run, setup)
        even = args.unlabelled or args.class_weights != "none"  # all labels count alike
        if setup.start is None and not even:
            learner.start_with_frequencies(examples["train"].labels)
    recipe = method.recipe(args, examples["train"], model.bert.config.hidden_size, setup.source)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    count = sum(model.get_parameter(name).numel() for name in names)
    total = sum(p.numel() for p in model.parameters())
    runtime.log(f"trains {count:,} of {total:,} parameters: {group_names(names)}")
    compiles = runtime.compiles(args.compile, setup.attention) and learner is model
    if compiles:
        tokens = recipe["batch_tokens"] // args.accumulate
        runtime.compile_layers(model.bert, args.max_len, tokens)
    candidates, cost = train(learner, examples, recipe, experiment, setup, started)
    answers, labels = {}, setup.reviews.names  # the only place where test rows are scored
    for split in ("validation", "test"):
        rows, shape = examples[split], (len(labels), recipe["batch_tokens"])
        answers[split] = logits_of(learner, rows, *shape, runtime), rows.labels
    model.temperature = fit_temperature(*answers["validation"])
    test = score(*answers["test"])
    runtime.log(f"test accuracy {test['accuracy']:.2%}")

    seconds = cost["seconds"] + (reading["seconds"] if reading else 0.0)
    tokens = reading["tokens"] if reading else cost["tokens"]
    best = candidates[0]
    metrics = {
        "method": experiment.method, **test, "temperature": model.temperature,
        "validation_accuracy": best["accuracy"], "validation_loss": best["loss"],
        **{key: best.get(key) for key in ("average_of", "best_training", "best_epoch")},
        "candidates": candidates, "soup": args.soup, **recipe, "steps": cost["steps"],
        "trainable_params": count, "total_params": total, "trained": names,
        "train_examples": labelled, "seed": experiment.seed,
        "unlabelled": len(examples["train"]) - labelled,
        "train_seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds),
        "total_seconds": round(cost["earlier_seconds"] + time.monotonic() - started, 1),
        "peak_memory_bytes": runtime.peak_memory(), "model": args.model, "data": args.data,
        "device": runtime.describe(), "threads": torch.get_num_threads(),
        "precision": runtime.precision, "attention": setup.attention,
        "compiled": compiles,
    }  # fmt: skip
    if runtime.is_main:
        metrics["saved_bytes"] = save(model, experiment, setup).stat().st_size
        save_answers(run.directory / "answers.json", answers, labels, model.temperature)
        run.finish(metrics)
    return metrics


def choose_unlabelled(texts: TokenizedTexts, seed: int) -> TokenizedTexts:
    """Some of these texts, drawn at random: the same as prompt.py draws."""
    order = np.random.default_rng(seed).permutation(len(texts.lengths))
    return texts.select(order[:UNLABELLED])


def choose_rows(
    experiment: Experiment, setup: Setup, examples: dict[str, Examples]
) -> dict[str, Examples]:
    """The rows of each split.

    With --train-examples N at most N / 2 validation rows choose the epoch: whoever has few labels
    to train on has no thousand to choose by (Perez et al. 2021, "True Few-Shot Learning with
    Language Models").
    """
    examples = dict(examples)
    if experiment.train_examples is not None:
        few = {"train": experiment.train_examples, "validation": experiment.train_examples // 2}
        for split, count in few.items():
            count = min(count, len(examples[split]))
            rows = setup.reviews.balanced_subset(split, count, experiment.seed)
            examples[split] = examples[split].select(rows)
    return examples


def known_labels(experiment: Experiment, setup: Setup) -> dict[int, int]:
    """The labels that --train-examples allows to read, by their training rows."""
    rows = setup.reviews.balanced_subset("train", experiment.train_examples, experiment.seed)
    return {int(row): int(setup.reviews.labels["train"][row]) for row in rows}


def ask_teacher(
    experiment: Experiment, setup: Setup, known: dict[int, int], started: float
) -> Tensor:
    """Log-probabilities (N, L) of all training rows, by a prompt and a bag of words.

    Where labels are known, the prompt learns from them first.
    """
    run, runtime = Run(experiment.run.state_path.parent / "teacher"), setup.runtime
    path, texts = run.directory / "answers.safetensors", setup.reviews.texts["train"]
    key = tuple(known.items())
    if path.is_file():  # the run is resumed
        setup.teachers[key] = load_file(path)["logs"]
    run.state_path.parent.mkdir(parents=True, exist_ok=True)
    if key not in setup.teachers:
        runtime.log(f"the teacher: a prompt that learned from {plural(len(key), 'label')}")
        options = options_of("prompt", setup.args) | {"template": setup.args.template[:1]}
        model = build("prompt", setup.source, setup.reviews.names, setup.attention, **options)
        model.to(runtime.device)
        examples = setup.read(model)
        model.calibrate(choose_unlabelled(examples["train"].inputs, setup.args.seed), runtime)
        if known:
            pupil = Experiment("prompt", len(known), experiment.seed, run)
            few = choose_rows(pupil, setup, examples)
            size = model.bert.config.hidden_size
            recipe = METHODS["prompt"].recipe(setup.args, few["train"], size, setup.source)
            train(model, few, recipe, pupil, setup, started)
        rows, size = examples["train"], reading_tokens(runtime.device)
        logs = logits_of(model, rows, len(setup.reviews.names), size, runtime)
        setup.teachers[key] = both_views(texts, logs, known)
    if runtime.is_main and not path.is_file():
        write_tensors(path, {"logs": setup.teachers[key]}, {})
    return setup.teachers[key]


def read_features(
    model: FeatureClassifier, examples: dict[str, Examples], run: Run, setup: Setup
) -> tuple[dict[str, Examples], dict]:
    """The features of the rows of each split, and `seconds` and `tokens` of the training rows.

    The test rows and the encoder are those of all experiments, so they are read once.
    """
    features, reading = {}, {"tokens": examples["train"].tokens}
    for split, rows in examples.items():
        prefix = run.state_path.with_name(f"{split}-features")
        if split == "test" and setup.test_features is not None:
            matrix = setup.test_features
        else:
            matrix, seconds = extract(model.bert, rows.inputs, prefix, setup.runtime)
        features[split] = Examples(Features(matrix), rows.labels)
        if split == "train":
            reading["seconds"] = seconds
            model.head.standardise(matrix)
    setup.test_features = features["test"].inputs.matrix
    return features, reading


def train(
    learner: nn.Module,
    examples: dict[str, Examples],
    recipe: dict,
    experiment: Experiment,
    setup: Setup,
    started: float,
) -> tuple[list[dict], dict]:
    """Train once, or --soup times from the same weights; the learner gets the best by validation.

    Candidates are the best epoch of each training, and averages of two trainings or more. Returns
    the validation metrics of all candidates, the best first, and the cost of the trainings.
    `started` is when this process began.
    """
    args, run, runtime = setup.args, experiment.run, setup.runtime
    rates = [recipe[key] for key in ("optimizer", "lr", "adamw_lr")]
    rates += [args.weight_decay, LRMultipliers(**recipe["lr_multipliers"])]
    options = {"accumulate": args.accumulate, "save_minutes": args.save_minutes, "warmup": 0.1}
    plan = {key: recipe[key] for key in ("batch_tokens", "epochs")}
    plan["class_weights"] = args.class_weights
    # A student that has not learned from its teacher yet must not be kept by chance.
    is_taught = examples["train"].labels.is_floating_point()
    plan["start_counts"] = isinstance(learner, ClozeClassifier) and not is_taught
    start, log, candidates = copy.deepcopy(learner.state_dict()), [], []  # (metrics, weights)
    cost = {"steps": 0, "tokens": 0, "seconds": 0.0, "earlier_seconds": 0.0}
    for k in range(args.soup):
        part = run if args.soup == 1 else Run(run.state_path.parent / f"training-{k + 1}")
        part.state_path.parent.mkdir(parents=True, exist_ok=True)
        seed = experiment.seed + SOUP_SEEDS * k
        learner.load_state_dict(start)
        task = Classification(examples["train"], examples["validation"], seed=seed, **plan)
        optimizer = Optimizer(learner, *rates)
        trainer = Trainer(learner, optimizer, task, part, runtime, seed=seed, **options)
        trainer.steps, trainer.started = task.steps, started
        name = f"training {k + 1} of {args.soup}: " if args.soup > 1 else ""
        runtime.log(f"{name}{task.steps:,} steps, {describe_recipe(recipe, task.unit)}")
        if checkpoint := part.load():
            trainer.restore(checkpoint)
            runtime.log(f"resumed at step {trainer.step:,} of {trainer.steps:,}")
        metrics = trainer.train() | {"average_of": 1, "best_training": k + 1}
        metrics["best_epoch"] = [0, *task.epoch_ends].index(trainer.best_step)
        candidates.append((metrics, trainer.best_weights))
        cost = {key: value + getattr(trainer, key) for key, value in cost.items()}
        log += [{"training": k + 1} | entry for entry in part.read_log()]
        started = time.monotonic()
    for count in range(2, args.soup + 1):
        weights = average([weights for _, weights in candidates[:count]])
        learner.load_state_dict(weights, strict=False)
        metrics = trainer.evaluate() | {"average_of": count}
        candidates.append((metrics, weights))
        accuracy = f"validation accuracy {metrics['accuracy']:.2%}"
        runtime.log(f"the average of {count} trainings: {accuracy}")
    if args.soup > 1 and runtime.is_main:  # one log of all trainings
        lines = "".join(json.dumps(entry) + "\n" for entry in log)
        write_atomically(run.directory / "log.jsonl", lines.encode())
    candidates.sort(key=lambda candidate: task.score(candidate[0]), reverse=True)
    best, weights = candidates[0]
    learner.load_state_dict(weights, strict=False)
    origin = f"the average of {best['average_of']} trainings"
    if best["average_of"] == 1:
        origin = f"epoch {best['best_epoch']} of training {best['best_training']}"
    runtime.log(f"best: {origin}, validation accuracy {best['accuracy']:.2%}")
    return [metrics for metrics, _ in candidates], cost


@torch.no_grad()
def average(trainings: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A soup: the mean of each tensor over several trainings that began with the same weights.

    Each training reads the same rows in another order and ends with other weights. From pretrained
    weights they end in one region of low loss, so that the loss of their average is low too, as a
    rule lower than that of each; and it is one network (Wortsman et al. 2022, "Model soups:
    averaging weights of multiple fine-tuned models improves accuracy without increasing inference
    time").
    """
    return {name: torch.stack([one[name] for one in trainings]).mean(0) for name in trainings[0]}


def save(model: nn.Module, experiment: Experiment, setup: Setup) -> Path:
    """Write the whole model if all of it was trained, else what was; returns the path."""
    directory, method, args = experiment.run.directory, experiment.method, setup.args
    base, base_hash = str(setup.source) if setup.start else args.model, setup.settings["base_hash"]
    options, max_len, written = setup.options(method), args.max_len, None
    is_cloze = isinstance(model, ClozeClassifier)
    if is_cloze:
        max_len = model.max_len
        options.pop("cloze_len", None)
    if all(p.requires_grad for p in model.parameters()):
        save_model(model.masked_lm() if is_cloze else model, setup.tokenizer, directory)
        written = directory / "model.safetensors"
        if not is_cloze:
            return written
        base, base_hash = str(directory), weights_hash(directory)
        options["train"] = None
        model.requires_grad_(False)
    layout = PeftDirectory if method in METHODS_OF_PEFT.values() else Trained
    saved = layout(method, model.pooling, options, setup.reviews.names, max_len, base, base_hash)
    saved.temperature = model.temperature
    path = saved.save(model, directory)
    return written or path


def group_names(names: Iterable[str]) -> str:
    """Parameter names in a line: those of all layers as one, weight and bias as one."""
    short = [re.sub(r"\.\d+\.", ".*.", name) for name in names]
    return ", ".join(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in short))
