"""Whether a run of train.py or finetune.py is healthy, from its own files."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from minitune.data import Dataset, Reviews
from minitune.methods import METHODS
from minitune.support.errors import UserError, plural
from minitune.support.finding import GOOD, NOTE, WRONG, Finding
from minitune.support.reference import NEAR, PLATEAU, REFERENCE, is_comparable, last_loss, until
from minitune.support.runs import Run, read_if_there, read_json
from minitune.support.text_files import Columns

DAMAGED = UserError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError


def examine_run(directory: Path) -> Iterator[Finding]:
    """A run of train.py, or those of finetune.py in a directory, from their own logs."""
    for path in [path.parent for path in sorted(directory.rglob("settings.json"))]:
        try:
            yield from _examine_files(path)
        except DAMAGED as error:
            what = str(error) if isinstance(error, UserError) else repr(error)
            yield Finding(str(path), WRONG, f"{path}: damaged: {what}", "start it again")


def _examine_files(path: Path) -> Iterator[Finding]:
    """One run. Any error of DAMAGED where its files hold what no run writes."""
    settings, losses = read_json(path / "settings.json"), Run(path).read_log()
    metrics, step = read_if_there(path / "metrics.json"), losses[-1]["step"] if losses else 0
    pretraining = "preset" in settings
    if metrics:
        yield Finding(str(path), GOOD, f"{path}: finished, {plural(step, 'step')}")
    else:
        found = f"{path}: stopped, or still at work, at step {step:,}"
        if steps := losses and losses[-1].get("steps"):  # logs of earlier versions have no steps
            found += f" of {steps:,}"
        # finetune.py writes to OUT/METHOD, or to folders in it.
        out = next((p.parent for p in (path, *path.parents) if p.name in METHODS), path)
        advice = f"continue it with --resume --out {shlex.quote(str(path if pretraining else out))}"
        yield Finding(str(path), NOTE, found, advice)
    if losses:
        examine = _examine_pretraining if pretraining else _examine_fine_tuning
        yield from examine(path, settings, losses, metrics)
        yield from _examine_validation(path, losses, pretraining)
    elif metrics:
        yield Finding(str(path), WRONG, f"{path}: no step is in its log", "start it again")


def _examine_pretraining(
    path: Path, settings: dict, losses: list[dict], metrics: dict
) -> Iterator[Finding]:
    """Its loss beside that of the reference run at the same number of tokens."""
    reference = Run(REFERENCE).read_log()
    unigram = metrics.get("unigram_loss", read_json(REFERENCE / "metrics.json")["unigram_loss"])
    last, tokens, step = last_loss(losses), losses[-1]["tokens"], losses[-1]["step"]
    found = f"{path}: loss {last:.2f} after {plural(step, 'step')}"
    if not is_comparable(settings):
        found += "; the reference run had other data, another model or another mask rate"
        yield Finding(str(path), NOTE, found, "compare it with the unigram entropy it printed")
    elif tokens > reference[-1]["tokens"]:
        yield Finding(str(path), GOOD, f"{found}; the reference run ended earlier")
    else:
        there = last_loss(until(tokens, reference))
        found += f"; the reference run had {there:.2f} after as many tokens"
        if last > there + NEAR:
            rates = {key: settings.get(key) for key in ("lr", "adamw_lr", "batch_tokens")}
            given = ", ".join(f"{key} {value}" for key, value in rates.items())
            advice = f"what differs from the defaults? ({given})"
            yield Finding(str(path), WRONG, found, advice)
        else:
            yield Finding(str(path), GOOD, found)
    if last > unigram - PLATEAU:
        found = f"{path}: the plateau: no better than guessing each word by its frequency"
        early = step < 300
        advice = "normal before 300 steps: wait" if early else "more steps, or a lower --lr"
        yield Finding(str(path), NOTE if early else WRONG, f"{found} ({unigram:.2f})", advice)


def _examine_fine_tuning(
    path: Path, settings: dict, losses: list[dict], metrics: dict
) -> Iterator[Finding]:
    """Whether it answers anything but the most frequent label."""
    if not metrics:
        return
    accuracy, found = metrics["accuracy"], f"{path}: test accuracy {metrics['accuracy']:.1%}"
    try:
        columns = Columns(*(settings.get(f"{key}_column", key) for key in Columns._fields))
        data = Dataset(metrics["data"], settings.get("test"), columns=columns)
        reviews = Reviews.load(data)
    except UserError as error:
        yield Finding(str(path), NOTE, f"{found}; its data cannot be read: {error}")
        return
    share = torch.bincount(reviews.labels["test"]).max().item() / len(reviews.labels["test"])
    found += f"; always the same answer would have {share:.1%}"
    if accuracy > share + 0.02:
        yield Finding(str(path), GOOD, found)
    else:
        advice = "no better than that: look at the labels, then try another --lr or more rows"
        yield Finding(str(path), WRONG, found, advice)


def _examine_validation(path: Path, losses: list[dict], pretraining: bool) -> Iterator[Finding]:
    """Whether the loss on validation rows rises while that of training falls."""
    validation = [entry["validation"]["loss"] for entry in losses if "validation" in entry]
    if len(validation) < 3:
        return
    best = int(np.argmin(validation))
    if validation[-1] > 1.05 * validation[best] and best < len(validation) - 1:
        found = f"{path}: overfitting: validation loss {validation[best]:.3f} at best, after "
        found += f"{best + 1} of {len(validation)} evaluations, and {validation[-1]:.3f} at the end"
        advice = (
            "more text, or fewer --minutes" if pretraining else "the best epoch is what is kept"
        )
        yield Finding(str(path), NOTE, found, advice)
