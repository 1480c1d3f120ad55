"""Fine-tuning by one method, from pretrained weights to the accuracy on the test rows.

What a method trains, and at which rate, is a row of methods.METHODS. The steps are the same for
all: build the model, choose the rows, train, keep the best by validation, and score the test rows
once, at the end.
"""

import re
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from minitune.checkpoint import save_model, weights_hash
from minitune.classification import Examples
from minitune.cloze import ClozeClassifier
from minitune.experiment import Experiment, Setup, choose_rows, known_labels
from minitune.features import FeatureClassifier, Features, extract
from minitune.methods import METHODS
from minitune.peft_files import METHODS_OF_PEFT, PeftDirectory
from minitune.self_training import ask_teacher, taught_rows
from minitune.soup import train
from minitune.support.errors import plural
from minitune.support.runs import Run
from minitune.temperature import fit_temperature, logits_of, save_answers, score
from minitune.trained import Trained


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
        examples |= taught_rows(texts, ask_teacher(experiment, setup, known), known)
        rows = plural(len(examples["validation"]), "row")
        runtime.log(f"validation: agreement with the teacher on {rows} without a label")
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
    if not args.unlabelled:  # a student agrees with its teacher more often than it is right
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
        "unlabelled": len(examples["train"]) - labelled, "masked_words": cost["masked_words"],
        "train_seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds),
        "total_seconds": round(cost["earlier_seconds"] + time.monotonic() - started, 1),
        "peak_memory_bytes": runtime.peak_memory(), "model": args.model, "data": args.data,
        "device": runtime.describe(), "threads": torch.get_num_threads(),
        "precision": runtime.precision, "attention": setup.attention,
        "compiled": compiles, "graphs": cost["graphs"],
    }  # fmt: skip
    if runtime.is_main:
        metrics["saved_bytes"] = save(model, experiment, setup).stat().st_size
        save_answers(run.directory / "answers.json", answers, labels, model.temperature)
        run.finish(metrics)
    return metrics


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
