"""Fine-tuning: what each method trains, and the way from pretrained weights to test accuracy.

A method is a row of METHODS and a function that names its trained parameters. All else follows
from the row: training, saving what was trained, loading it again, the table and the picture.
"""

import argparse
import copy
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minitune.adapters import adapter_parameters, insert_adapters, parameters_of
from minitune.checkpoint import load_for_classification, save_model
from minitune.classification import Classification, Examples
from minitune.data import Reviews
from minitune.features import FeatureClassifier, Features, extract
from minitune.ia3 import ia3_parameters, insert_ia3
from minitune.lora import insert_lora, lora_parameters
from minitune.model import Bert, BertConfig, BertForSequenceClassification
from minitune.optimizer import LRMultipliers, Optimizer
from minitune.peft_files import METHODS_OF_PEFT, PeftDirectory
from minitune.support.errors import UserError
from minitune.support.model_names import began_at_random
from minitune.support.runs import Run, write_atomically
from minitune.support.runtime import Runtime
from minitune.temperature import fit_temperature, logits_of, save_answers, score
from minitune.tokenizer import Tokenizer
from minitune.trained import Trained
from minitune.training import Trainer

MOST_TOKENS = 4096  # in a batch
LEAST_BATCHES = 8  # in an epoch
LEAST_STEPS, MOST_EPOCHS = 400, 20  # in a training
SOUP_SEEDS = 1000  # between the seeds of trainings that are averaged; --seeds counts by one


@dataclass(frozen=True)
class Method:
    """What a method trains and how. The numbers are from validation rows (benchmarks/LOG.md)."""

    summary: str
    trained: Callable[[nn.Module], list[str]]  # the names of the parameters that train
    lr: Callable[[int], float]  # peak learning rate, for a hidden size
    epochs: int  # where training rows are many
    batch_rows: int  # texts in a batch on average, where training rows are many
    optimizer: str = "adamw"  # "muon": for the matrices of the layers, and AdamW for the rest
    adamw: float = 1.0  # the peak of AdamW beside Muon, in multiples of lr
    lowest_layer: float = (
        1.0  # the learning rate of the lowest layer, in multiples of the highest's
    )
    pooling: str = "cls"  # hidden states to one vector: a key of model.POOLERS, or "layers"
    insert: Callable[..., None] = lambda bert: None  # puts new modules into the encoder
    options: tuple[str, ...] = ()  # of the command line, that `insert` takes
    pretrained: bool = True  # False: all weights start at random

    def recipe(self, args: argparse.Namespace, train: Examples, size: int, source: Path) -> dict:
        """The numbers of a training: what the options give, else what suits these rows.

        `size` is the model's hidden size, `source` the directory of its pretrained weights.
        """
        rows = max(1, min(self.batch_rows, len(train) // LEAST_BATCHES))
        longest, mean = int(train.inputs.lengths.max()), train.tokens / len(train)
        batch_tokens = max(min(round(rows * mean), MOST_TOKENS), longest)
        if args.batch_tokens and train.inputs.unit == "tokens":  # features are counted by the text
            batch_tokens = args.batch_tokens
        steps = -(-train.tokens // batch_tokens)  # in an epoch
        epochs = args.epochs or max(self.epochs, min(-(-LEAST_STEPS // steps), MOST_EPOCHS))
        lr = args.lr or self.lr(size)
        # Word embeddings move only where a step reads the word. Young ones want a larger rate.
        young = not self.pretrained or (self.trained is all_parameters and began_at_random(source))
        rates = {"embeddings": 5.0 if young else 1.0, "lowest_layer": self.lowest_layer}
        recipe = {"optimizer": self.optimizer, "epochs": epochs, "batch_tokens": batch_tokens}
        return recipe | {"lr": lr, "adamw_lr": self.adamw * lr, "lr_multipliers": rates}


def all_parameters(model: nn.Module) -> list[str]:
    """The names of all parameters."""
    return [name for name, _ in model.named_parameters()]


def biases_and_classifier(model: BertForSequenceClassification) -> list[str]:
    """The names of all biases, and of the classifier's weight (Ben Zaken et al. 2022, "BitFit")."""
    biases = [name for name in all_parameters(model) if name.endswith(".bias")]
    return ["classifier.weight", *biases]


def for_all_parameters(hidden_size: int) -> float:
    """A peak learning rate: 3e-4 for a hidden size of 256, 1.4e-4 for 384, and 3.4e-5 for 768.

    The last is among those recommended for BERT-base (Devlin et al. 2019, appendix A.3).
    """
    return 20 / hidden_size**2


METHODS = {
    "feature": Method(
        "the encoder is frozen and reads each text once; a linear classifier learns from features",
        trained=lambda model: parameters_of(model, ["head"]), pooling="layers",
        lr=lambda _: 3e-4, epochs=20, batch_rows=256,
    ),
    "bitfit": Method(
        "the biases of the frozen encoder, those of its LayerNorms too, and the classifier",
        trained=biases_and_classifier, pooling="mean",
        lr=lambda _: 3e-3, epochs=1, batch_rows=32,
    ),
    "ia3": Method(
        "vectors that multiply keys, values and units of the frozen encoder, pooler and classifier",
        trained=ia3_parameters, insert=insert_ia3,
        lr=lambda _: 1e-2, epochs=1, batch_rows=32,
    ),
    "lora": Method(
        "low-rank matrices beside those of the frozen encoder, the pooler and the classifier",
        trained=lora_parameters, insert=insert_lora,
        options=("lora_targets", "lora_rank", "lora_alpha", "lora_dropout", "rslora", "dora"),
        lr=lambda size: 10 * for_all_parameters(size), epochs=1, batch_rows=32,
    ),
    "adapter": Method(
        "bottlenecks inside the frozen encoder, the LayerNorms of its layers, and the classifier",
        # In a frozen network [CLS] gathers little, since masked-language modelling does not need
        # it; and BERT's pooler would be a fifth of all that a small model trains.
        trained=adapter_parameters, pooling="mean",
        insert=insert_adapters, options=("adapter_size",),
        lr=lambda _: 1e-2, epochs=1, batch_rows=32, optimizer="muon", adamw=0.2,
    ),
    "full": Method(
        "all parameters",
        trained=all_parameters,
        # A third from bottom to top: 0.7 from layer to layer in four of them, 0.8 in six.
        lr=for_all_parameters, epochs=1, batch_rows=32, lowest_layer=1 / 3,
    ),
    "scratch": Method(
        "all parameters, from random weights: what pretraining was worth",
        trained=all_parameters, pretrained=False,
        lr=for_all_parameters, epochs=1, batch_rows=32,
    ),
}  # fmt: skip


def build(
    method: str, source: Path, labels: dict[int, str], attention="sdpa", pooling="", **options: int
) -> BertForSequenceClassification | FeatureClassifier:
    """The model of a method on the pretrained weights in `source`; what does not train is frozen.

    `options` are the method's. `pooling` is the method's if empty, else that of a saved model: its
    new parameters take no memory ("meta") until it is filled.
    """
    recipe = METHODS[method]
    reads_layers = (pooling or recipe.pooling) == FeatureClassifier.pooling
    pooler = "cls" if reads_layers else pooling or recipe.pooling
    model, new = load_for_classification(source, labels, attention, pooler, recipe.pretrained)
    known = set(all_parameters(model)) - set(new)
    with torch.device("meta" if pooling else "cpu"):
        if reads_layers:
            model = FeatureClassifier(model.bert, len(labels))
        recipe.insert(model.bert, **options)
    trained = set(recipe.trained(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        if name not in trained | known:
            raise ValueError(f"{method}: {name} is neither pretrained nor trained")
    return model


def load_trained(
    trained: Trained, directory: Path, source: Path, attention: str
) -> BertForSequenceClassification | FeatureClassifier:
    """The model of a run that saved what it trained, on the pretrained weights in `source`."""
    shape = trained.labels, attention, trained.pooling
    try:
        model = build(trained.method, source, *shape, **trained.options)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{directory}/{trained.file} is damaged: {error!r}") from error
    trained.fill(model, directory)
    model.temperature = trained.temperature
    return model


def check_options(method: str, config: BertConfig, args: argparse.Namespace) -> None:
    """Raise UserError where the options of a method do not suit the sizes of a model."""
    with torch.device("meta"):
        options = {name: getattr(args, name) for name in METHODS[method].options}
        METHODS[method].insert(Bert(config), **options)


@dataclass
class Setup:
    """What all experiments of a command share."""

    args: argparse.Namespace
    settings: dict  # for settings.json
    source: Path  # the directory of the pretrained model, which args.model names
    tokenizer: Tokenizer
    reviews: Reviews
    examples: dict[str, Examples]  # by split
    runtime: Runtime
    attention: str  # the backend


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
    """One experiment, from the pretrained weights to the accuracy on the test rows: its metrics."""
    args, run, runtime, started = setup.args, experiment.run, setup.runtime, time.monotonic()
    method = METHODS[experiment.method]
    runtime.log(f"\n{experiment.method}: {method.summary}")
    for key, what in (("base_hash", "base model"), ("dataset", "data")):
        if run.settings and run.settings.get(key) != setup.settings[key]:
            raise UserError(f"the {what} of the run in {run.directory} has changed since it began")
    if run.is_finished:
        run.clean_up()  # it may have been killed just before that
        runtime.log(f"{run.directory} is finished")
        return run.metrics
    runtime.reset_peak_memory()
    torch.manual_seed(experiment.seed)
    options = {name: getattr(args, name) for name in method.options}
    labels = setup.reviews.names
    # Before the run starts: where the model's file is damaged, no directory is left behind.
    model = build(experiment.method, setup.source, labels, setup.attention, **options)
    model.to(runtime.device)
    runtime.cast_frozen(model.bert)
    if runtime.is_main:
        run.start(setup.settings | {"experiment": experiment.description})
    runtime.barrier()  # the directory is there

    learner, examples, reading = prepare_rows(model, experiment, setup)
    hidden_size = model.bert.config.hidden_size
    recipe = method.recipe(args, examples["train"], hidden_size, setup.source)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    sizes = {"trainable_params": sum(map(sizes.get, trained)), "total_params": sum(sizes.values())}
    runtime.log("trains {:,} of {:,} parameters: {}".format(*sizes.values(), in_short(trained)))
    candidates, cost = train(learner, examples, recipe, experiment, setup, started)
    best = candidates[0]
    origin = "epoch {best_epoch} of training {best_training}"
    if best["average_of"] > 1:
        origin = "the average of {average_of} trainings"
    runtime.log(f"best: {origin}, validation accuracy {{accuracy:.2%}}".format(**best))

    answers = {}  # the test rows are read here, and only this once
    for split in ("validation", "test"):
        rows, shape = examples[split], (len(labels), recipe["batch_tokens"])
        answers[split] = logits_of(learner, rows, *shape, runtime), rows.labels
    model.temperature = fit_temperature(*answers["validation"])
    metrics = {"method": experiment.method} | score(*answers["test"])
    metrics["temperature"] = model.temperature
    runtime.log(f"test accuracy {metrics['accuracy']:.2%}")
    seconds = cost["seconds"] + reading.get("seconds", 0.0)
    total_seconds = cost["earlier_seconds"] + time.monotonic() - started
    metrics |= {"validation_accuracy": best["accuracy"], "validation_loss": best["loss"]}
    metrics |= {key: best.get(key) for key in ("average_of", "best_training", "best_epoch")}
    metrics |= recipe | sizes | {"trained": trained, "candidates": candidates, "soup": args.soup}
    metrics |= {"train_examples": len(examples["train"]), "seed": experiment.seed}
    metrics |= {"train_seconds": round(seconds, 1), "total_seconds": round(total_seconds, 1)}
    metrics["tokens_per_second"] = round(reading.get("tokens", cost["tokens"]) / seconds)
    metrics |= {"steps": cost["steps"], "peak_memory_bytes": runtime.peak_memory()}
    metrics |= {"model": args.model, "data": args.data, "device": runtime.describe()}
    metrics |= {"precision": runtime.precision, "attention": setup.attention}
    metrics["threads"] = torch.get_num_threads()
    if runtime.is_main:
        metrics["saved_bytes"] = save(model, experiment, setup).stat().st_size
        save_answers(run.directory / "answers.json", answers, labels, model.temperature)
        run.finish(metrics)
    return metrics


def prepare_rows(
    model: nn.Module, experiment: Experiment, setup: Setup
) -> tuple[nn.Module, dict[str, Examples], dict]:
    """What trains, the rows of each split as it reads them, and what it took to read them once.

    With few labels, as few choose the best epoch: in practice there would be no more.
    """
    examples = dict(setup.examples)
    if count := experiment.train_examples:
        for split in ("train", "validation"):
            few = min(count, len(examples[split]))
            rows = setup.reviews.balanced_subset(split, few, experiment.seed)
            examples[split] = examples[split].select(rows)
    if not isinstance(model, FeatureClassifier):
        return model, examples, {}
    reading = {"tokens": examples["train"].tokens}
    for split, rows in examples.items():
        prefix = experiment.run.state_path.with_name(f"{split}-features")
        matrix, seconds = extract(model.bert, rows.inputs, prefix, setup.runtime)
        examples[split] = Examples(Features(matrix), rows.labels)
        if split == "train":
            reading["seconds"] = seconds
            model.head.standardise(matrix)
    return model.head, examples, reading


def train(
    learner: nn.Module,
    examples: dict[str, Examples],
    recipe: dict,
    experiment: Experiment,
    setup: Setup,
    started: float,
) -> tuple[list[dict], dict]:
    """Train once, or --soup times from the same weights; the learner gets the best by validation.

    That is the best epoch of a training, or the average of two trainings or more. Returns the
    figures of these, the best first, and the cost; `started` is when this process began.
    """
    args, run, runtime = setup.args, experiment.run, setup.runtime
    rates = [recipe[key] for key in ("optimizer", "lr", "adamw_lr")]
    rates += [args.weight_decay, LRMultipliers(**recipe["lr_multipliers"])]
    options = {"accumulate": args.accumulate, "save_minutes": args.save_minutes, "warmup": 0.1}
    plan = {key: recipe[key] for key in ("batch_tokens", "epochs")}
    plan["class_weights"] = args.class_weights
    start, log, found = copy.deepcopy(learner.state_dict()), [], []  # (figures, weights)
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
        runtime.log(f"{name}{task.steps:,} steps, {in_words(recipe, task.unit)}")
        if checkpoint := part.load():
            trainer.restore(checkpoint)
            runtime.log(f"resumed at step {trainer.step:,} of {trainer.steps:,}")
        figures = trainer.train() | {"average_of": 1, "best_training": k + 1}
        figures["best_epoch"] = task.epoch_ends.index(trainer.best_step) + 1
        found.append((figures, trainer.best_weights))
        cost = {key: value + getattr(trainer, key) for key, value in cost.items()}
        log += [{"training": k + 1} | entry for entry in part.read_log()]
        started = time.monotonic()
    for count in range(2, args.soup + 1):
        weights = average([weights for _, weights in found[:count]])
        learner.load_state_dict(weights, strict=False)
        found.append((trainer.evaluate() | {"average_of": count}, weights))
        accuracy = found[-1][0]["accuracy"]
        runtime.log(f"the average of {count} trainings: validation accuracy {accuracy:.2%}")
    if args.soup > 1 and runtime.is_main:  # one log of all trainings
        lines = "".join(json.dumps(entry) + "\n" for entry in log)
        write_atomically(run.directory / "log.jsonl", lines.encode())
    found.sort(key=lambda one: task.score(one[0]), reverse=True)
    learner.load_state_dict(found[0][1], strict=False)
    return [figures for figures, _ in found], cost


@torch.no_grad()
def average(trainings: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A soup: the mean of each tensor over several trainings that began with the same weights.

    Each training reads the same rows in another order and ends somewhere else, but pretrained
    weights hardly leave the valley of the loss that they are in. The average lies in it too, as a
    rule deeper than what went into it, and is still one network (Wortsman et al. 2022, "Model
    soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
    inference time").
    """
    return {name: torch.stack([one[name] for one in trainings]).mean(0) for name in trainings[0]}


def save(model: nn.Module, experiment: Experiment, setup: Setup) -> Path:
    """Write the whole model if all of it was trained, else what was; returns the path."""
    directory, name, args = experiment.run.directory, experiment.method, setup.args
    if all(p.requires_grad for p in model.parameters()):
        save_model(model, setup.tokenizer, directory)
        return directory / "model.safetensors"
    options = {key: getattr(args, key) for key in METHODS[name].options}
    labels, base = setup.reviews.names, setup.settings["base_hash"]
    kind = PeftDirectory if name in METHODS_OF_PEFT.values() else Trained
    trained = kind(name, model.pooling, options, labels, args.max_len, args.model, base)
    trained.temperature = model.temperature
    return trained.save(model, directory)


def in_short(names: Iterable[str]) -> str:
    """Parameter names in a line: those of all layers as one, weight and bias as one."""
    short = [re.sub(r"\.\d+\.", ".*.", name) for name in names]
    return ", ".join(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in short))


def in_words(recipe: dict, unit: str) -> str:
    """The numbers of a training; `unit` is that of a batch's size."""
    words = "{epochs} epochs, at most {batch_tokens:,} {unit} a step, {optimizer} at {lr:.2g}"
    words = words.format(unit=unit, **recipe).replace("1 epochs,", "1 epoch,")
    if recipe["optimizer"] == "muon":
        words += f", adamw at {recipe['adamw_lr']:.2g} for the rest"
    for part, multiplier in recipe["lr_multipliers"].items():
        if multiplier != 1:
            words += f", {part.replace('_', ' ')} at {multiplier:.2g} times that"
    return words
