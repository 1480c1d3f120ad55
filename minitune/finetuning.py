"""One fine-tuning method, from the pretrained weights to its accuracy on the test rows."""

import argparse
import copy
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minitune.adapters import adapter_modules, insert_adapters
from minitune.checkpoint import (
    began_at_random,
    load_for_classification,
    read_config,
    save_model,
    save_trained,
)
from minitune.classification import Classification, Examples
from minitune.data import Reviews
from minitune.features import FeatureClassifier, extract
from minitune.model import BertForSequenceClassification, MeanPooler
from minitune.optimizer import LRMultipliers, Optimizer
from minitune.support.errors import UserError
from minitune.support.runs import Run, write_atomically
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer
from minitune.training import Trainer, evaluate, train_or_say_how_to_go_on


@dataclass
class Job:
    """One method on one choice of training rows, and the directory of its run."""

    method: str
    train_examples: int | None  # None: all
    seed: int
    run: Run


@dataclass
class Common:
    """What all methods share."""

    args: argparse.Namespace
    settings: dict
    name: str  # of the pretrained model, as given
    source: Path  # its directory
    tokenizer: Tokenizer
    reviews: Reviews
    examples: dict[str, Examples]
    runtime: Runtime
    attention: str  # the backend that --attention stands for


def fine_tune(job: Job, common: Common) -> dict:
    """One method, from the pretrained weights to its accuracy on the test rows; returns the metrics."""
    args, run, runtime = common.args, job.run, common.runtime
    say, recipe = runtime.log, METHODS[job.method]
    say(f"\n{job.method}: {recipe.summary}")
    for key in ("base", "dataset"):
        if run.settings and run.settings[key] != common.settings[key]:
            raise UserError(f"the {key} of the run in {run.directory} has changed since it began")
    if run.is_finished:
        run.clean_up()  # killed between its last two lines
        say(f"{run.directory} is finished")
        return run.metrics
    started = time.monotonic()
    runtime.reset_peak_memory()
    # The model comes first: where its file is damaged, no directory is left behind.
    torch.manual_seed(job.seed)
    model = build(
        job.method, common.source, common.reviews.names, args.adapter_size, common.attention
    )
    model.to(runtime.device)
    runtime.cast_frozen(model.bert)
    # A run that goes on keeps its own.
    own_rates = (
        LRMultipliers(**run.settings["rates"]) if run.settings else rates(job.method, common.source)
    )
    if runtime.is_main:
        described = {k: v for k, v in vars(job).items() if k != "run"}
        run.start(common.settings | {"job": described, "rates": asdict(own_rates)})
    runtime.barrier()  # the directory is there, and this job's

    # The rows it learns from. With few labels, as few choose the best epoch: no more would be at
    # hand.
    examples = dict(common.examples)
    if count := job.train_examples:
        for split in ("train", "validation"):
            few = min(count, len(examples[split]))
            examples[split] = examples[split].select(common.reviews.choose(split, few, job.seed))
    tokens = examples["train"].tokens

    # The part of it that learns.
    learner, extraction_seconds = model, 0.0
    if job.method == "feature":
        directory = run.state_path.parent
        examples, extraction_seconds = extract(model.bert, examples, directory, runtime)
        learner, runtime = model.head, replace(runtime, precision="fp32")
        learner.standardise(examples["train"].inputs.matrix)
    # The head of "feature" reads vectors, one a text, so that its budget counts texts.
    asked = args.batch_tokens if learner is model else None
    batch_tokens = asked or recipe.batch_tokens(examples["train"])
    epochs = args.epochs or recipe.epochs(examples["train"], batch_tokens)
    lr = args.lr or recipe.lr(model.bert.config.hidden_size)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    total_params = sum(p.numel() for p in model.parameters())
    trainable_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"trains {trainable_params:,} of {total_params:,} parameters: {summary(trained)}")
    say(rates_in_words(recipe, lr, own_rates))

    # Train, several times where a soup is wanted; of each training the best epoch by validation.
    start = copy.deepcopy(learner.state_dict()) if args.soup > 1 else None
    seconds, steps, read, log, candidates = extraction_seconds, 0, 0, [], []
    for k in range(args.soup):
        seed = job.seed + SOUP_SEEDS * k
        task = Classification(
            examples["train"],
            examples["validation"],
            batch_tokens=batch_tokens,
            epochs=epochs,
            seed=seed,
        )
        optimizer = Optimizer(
            learner, recipe.optimizer, lr, recipe.adamw * lr, args.weight_decay, own_rates
        )
        part = Run(run.state_path.parent / f"training-{k + 1}") if args.soup > 1 else run
        part.state_path.parent.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(
            learner,
            optimizer,
            task,
            part,
            runtime,
            seed=seed,
            warmup=0.1,
            accumulate=args.accumulate,
            save_minutes=args.save_minutes,
        )
        if start:
            learner.load_state_dict(start)
        trainer.steps = task.steps
        name = f"training {k + 1} of {args.soup}: " if args.soup > 1 else ""
        say(f"{name}{epochs} epochs, {task.steps:,} steps of at most {batch_tokens:,} {task.unit}")
        if checkpoint := part.load():
            trainer.restore(*checkpoint)
            say(f"resumed at step {trainer.step:,} of {trainer.steps:,}")
        validation = train_or_say_how_to_go_on(trainer, args.out)
        epoch = task.epoch_ends.index(trainer.best["step"]) + 1
        found = {"best_epoch": epoch, "best_training": k + 1, "average_of": 1}
        candidates.append((validation, trainer.best_weights, found))
        seconds, steps, read = (
            seconds + trainer.seconds,
            steps + trainer.steps,
            read + trainer.tokens,
        )
        log += [{"training": k + 1} | entry for entry in part.read_log()]
    for count in range(2, args.soup + 1):
        weights = average([weights for _, weights, _ in candidates[:count]])
        trainer.load(weights)
        validation = trainer.evaluate()
        say(f"the average of {count} trainings: validation accuracy {validation['accuracy']:.2%}")
        found = {"best_epoch": None, "best_training": None, "average_of": count}
        candidates.append((validation, weights, found))
    validation, weights, found = max(candidates, key=lambda candidate: task.score(candidate[0]))
    trainer.load(weights)

    # Score the test rows, this once, and keep what was trained.
    test = evaluate(learner, examples["test"].batches(batch_tokens), runtime)
    best = f"epoch {found['best_epoch']} of {epochs}" + (
        f", training {found['best_training']}" if args.soup > 1 else ""
    )
    if found["average_of"] > 1:
        best = f"the average of {found['average_of']} trainings"
    say(f"best: {best}, validation accuracy {validation['accuracy']:.2%}")
    say(f"test accuracy {test['accuracy']:.2%}")
    metrics = {
        "method": job.method,
        **test,
        "validation_accuracy": validation["accuracy"],
        "validation_loss": validation["loss"],
        **found,
        "epochs": epochs,
        "soup": args.soup,
        "candidates": [figures | origin for figures, _, origin in candidates],
        "steps": steps,
        "lr": lr,
        "rates": asdict(own_rates),
        "trainable_params": trainable_params,
        "total_params": total_params,
        "train_seconds": round(seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
        # A frozen encoder reads each text once, however many epochs its head trains.
        "tokens_per_second": round((tokens if learner is not model else read) / seconds),
        "peak_memory_bytes": common.runtime.peak_memory(),
        "train_examples": len(examples["train"]),
        "seed": job.seed,
        "model": common.name,
        "data": args.data,
        "device": runtime.describe(),
        "precision": common.runtime.precision,
        "attention": common.attention,
    }
    if runtime.is_main:
        if args.soup > 1:  # one log of all trainings
            lines = "".join(json.dumps(entry) + "\n" for entry in log)
            write_atomically(run.directory / "log.jsonl", lines.encode())
        weights = save(model, job, common)
        metrics |= {"saved_bytes": weights.stat().st_size, "trained": trained}
        run.finish(metrics)
    return metrics


SOUP_SEEDS = 1000  # between the seeds of trainings that are averaged; --seeds counts by one


@torch.no_grad()
def average(trainings: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor over several trainings that began with the same weights.

    Each training reads the same rows in another order and ends somewhere else, but pretrained
    weights hardly leave the valley of the loss that they are in. The average lies in it too, as a
    rule deeper than what went into it, and is still one network (Wortsman et al. 2022, "Model
    soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
    inference time").
    """
    return {
        name: torch.stack([weights[name] for weights in trainings]).mean(0) for name in trainings[0]
    }


def save(model: nn.Module, job: Job, common: Common) -> Path:
    """Write the whole model where all of it was trained, else what was; returns the path of the weights."""
    directory = job.run.directory
    if job.method in ("full", "scratch"):
        save_model(model, common.tokenizer, directory)
        return directory / "model.safetensors"
    names, base_hash = common.reviews.names, common.settings["base"]
    return save_trained(
        directory, job.method, model, names, common.name, base_hash, common.args.max_len
    )


@dataclass(frozen=True)
class Method:
    """The defaults of a method, chosen on validation rows (tests/benchmarks/LOG.md)."""

    summary: str
    optimizer: str  # for the hidden matrices: "muon", or "adamw" for these and the rest
    lr: Callable[[int], float]  # peak, of that optimizer, for a hidden size
    passes: int  # over the training rows, where these are many
    batch_rows: int  # average texts in a batch, where training rows are many
    adamw: float = 1.0  # peak of AdamW for the rest, beside Muon, in multiples of lr

    def batch_tokens(self, train: Examples) -> int:
        """The token budget of a batch."""
        rows = max(1, min(self.batch_rows, len(train) // LEAST_BATCHES))
        longest, mean = int(train.inputs.lengths.max()), train.tokens / len(train)
        return max(min(round(rows * mean), MOST_TOKENS), longest)

    def epochs(self, train: Examples, batch_tokens: int) -> int:
        """Passes over the training rows: more of them where rows are few, for enough steps."""
        steps = -(-train.tokens // batch_tokens)
        return max(self.passes, min(-(-LEAST_STEPS // steps), MOST_PASSES))


MOST_TOKENS = 4096  # in a batch
LEAST_BATCHES = 8  # in an epoch
LEAST_STEPS, MOST_PASSES = 400, 20  # in a run


def for_all_weights(hidden_size: int) -> float:
    """A wider network wants less: 3e-4 for 256, 1.4e-4 for 384, and for the 768 of BERT-base 3.4e-5, amid
    what its paper recommends (Devlin et al. 2019, appendix A.3)."""
    return 20 / hidden_size**2


def rates(method: str, source: Path) -> LRMultipliers:
    """What learns faster and what slower than the rest, measured in tests/benchmarks/LOG.md.

    Word vectors are young in random weights, and in a run of train.py that began with them. Those
    of real weights lost a little by learning faster; where it is not known how a model began, or
    where --init went on from another, they count as settled.
    """
    young = method == "scratch" or (method == "full" and began_at_random(source))
    # Of random layers none knows more than another. A third: 0.7 a layer in four of them, 0.8 in
    # six.
    return LRMultipliers(
        embeddings=5.0 if young else 1.0, lowest_layer=1 / 3 if method == "full" else 1.0
    )


def rates_in_words(recipe: Method, lr: float, rates: LRMultipliers) -> str:
    """The optimizer and its learning rates, in a line; `lr` is the peak."""
    words = f"{recipe.optimizer} at {lr:.2g}"
    if recipe.optimizer == "muon":
        words += f", adamw at {recipe.adamw * lr:.2g} for the rest"
    if rates.embeddings != 1:
        words += f", {rates.embeddings:g} times that for embeddings"
    if rates.lowest_layer != 1:
        words += f", less for lower layers, down to {rates.lowest_layer:.2g} times that"
    return words


METHODS = {
    "feature": Method(
        summary="the encoder is frozen and reads each text once; a linear head learns from what it says",
        optimizer="adamw", lr=lambda _: 3e-4, passes=20, batch_rows=256,
    ),
    "adapter": Method(
        summary="bottlenecks inside the frozen encoder, the LayerNorms of its layers, and the head",
        optimizer="muon", lr=lambda _: 1e-2, adamw=0.2, passes=1, batch_rows=32,
    ),
    "full": Method(
        summary="everything",
        optimizer="adamw", lr=for_all_weights, passes=1, batch_rows=32,
    ),
    "scratch": Method(
        summary="everything, from random weights: what pretraining was worth",
        optimizer="adamw", lr=for_all_weights, passes=1, batch_rows=32,
    ),
}  # fmt: skip


def build(
    method: str, source: Path, labels: dict[int, str], adapter_size: int, attention: str
) -> BertForSequenceClassification | FeatureClassifier:
    """The pretrained model of a directory, ready for a method; what does not train is frozen."""
    if method == "scratch":
        model = BertForSequenceClassification(
            replace(read_config(source), id2label=labels), attention
        )
    else:
        model = load_for_classification(source, labels, attention)
    if method == "feature":
        model = FeatureClassifier(model.bert, len(labels))
    elif method == "adapter":
        insert_adapters(model.bert, adapter_size)
        # In a frozen network [CLS] gathers little, since masked-language modelling asks nothing of
        # it; and BERT's pooler would be a fifth of all that a small model trains.
        model.pooler = MeanPooler()
    chosen = set(choose_trained(model, method))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return model


def choose_trained(model: nn.Module, method: str) -> list[str]:
    """The names of the parameters that train."""
    if method == "feature":
        return [f"head.{name}" for name, _ in model.head.named_parameters()]
    if method == "adapter":
        return [
            f"{path}.{name}"
            for path, module in adapter_modules(model).items()
            for name, _ in module.named_parameters()
        ]
    return [name for name, _ in model.named_parameters()]


def summary(names: Iterable[str]) -> str:
    """Parameter names in a line: those of all layers as one, weight and bias as one."""
    short = [re.sub(r"\.\d+\.", ".*.", name) for name in names]
    return ", ".join(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in short))
