"""One training, or a soup: several trainings whose weights are averaged.

A training reads the same rows in an order of its own and ends with other weights. From pretrained
weights they end in one region of low loss, so that the loss of their average is low too, as a rule
lower than that of each; and it is one network (Wortsman et al. 2022, "Model soups: averaging
weights of multiple fine-tuned models improves accuracy without increasing inference time").
"""

import copy
import json
import time

import torch
from torch import Tensor, nn

from minitune.classification import Classification, Examples
from minitune.cloze import ClozeClassifier
from minitune.experiment import Experiment, Setup
from minitune.methods import METHODS, describe_recipe
from minitune.model import BertForSequenceClassification
from minitune.optimizer import LRMultipliers, Optimizer
from minitune.second_task import ClassificationAndMaskedWords
from minitune.support.runs import Run, write_atomically
from minitune.training import Trainer

SOUP_SEEDS = 1000  # between the seeds of trainings that are averaged; --seeds counts by one


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
    the validation metrics of all candidates, the best first, and the cost of the trainings,
    with whether they had CUDA graphs and a second task. `started` is when this process began.
    """
    args, run, runtime = setup.args, experiment.run, setup.runtime
    rates = [recipe[key] for key in ("optimizer", "lr", "adamw_lr")]
    rates += [args.weight_decay, LRMultipliers(**recipe["lr_multipliers"])]
    options = {"accumulate": args.accumulate, "save_minutes": args.save_minutes, "warmup": 0.1}
    graphs = runtime.repeats_graphs(args.cuda_graphs, setup.attention, args.accumulate)
    # A cloze is filled in by the processor, and a head alone needs no graph.
    options["graphs"] = graphs and isinstance(learner, BertForSequenceClassification)
    plan = {key: recipe[key] for key in ("batch_tokens", "epochs")}
    plan["class_weights"] = args.class_weights
    # A student that has not learned from its teacher yet must not be kept by chance.
    is_taught = examples["train"].labels.is_floating_point()
    plan["start_counts"] = isinstance(learner, ClozeClassifier) and not is_taught
    kind = Classification
    if setup.head and METHODS[experiment.method].pretrained:
        kind = ClassificationAndMaskedWords
        plan |= {"tokenizer": setup.tokenizer, "head": setup.head, "weight": args.masked_words}
        options["graphs"] = False  # its batches have no fixed shapes
    start, log, candidates = copy.deepcopy(learner.state_dict()), [], []  # (metrics, weights)
    cost = {"steps": 0, "tokens": 0, "seconds": 0.0, "earlier_seconds": 0.0}
    for k in range(args.soup):
        part = run if args.soup == 1 else Run(run.state_path.parent / f"training-{k + 1}")
        part.state_path.parent.mkdir(parents=True, exist_ok=True)
        seed = experiment.seed + SOUP_SEEDS * k
        learner.load_state_dict(start)
        task = kind(examples["train"], examples["validation"], seed=seed, **plan)
        optimizer = Optimizer(learner, *rates)
        trainer = Trainer(learner, optimizer, task, part, runtime, seed=seed, **options)
        trainer.steps, trainer.started = task.steps, started
        name = f"training {k + 1} of {args.soup}: " if args.soup > 1 else ""
        by = "; CUDA graphs: on" if trainer.graphs else ""
        if kind is ClassificationAndMaskedWords:
            by += f"; guesses masked words, too, at first with a weight of {args.masked_words:g}"
        runtime.log(f"{name}{task.steps:,} steps, {describe_recipe(recipe, task.unit)}{by}")
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
    cost |= {"graphs": options["graphs"], "masked_words": plan.get("weight", 0.0)}
    return [metrics for metrics, _ in candidates], cost


@torch.no_grad()
def average(trainings: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor over several trainings that began with the same weights."""
    return {name: torch.stack([one[name] for one in trainings]).mean(0) for name in trainings[0]}
