"""Where the time goes: from a plain training step to minitune's, a change at a time.

    python -m tests.benchmarks.ladder --plot ladder.png            ten minutes on two cores
    python -m tests.benchmarks.ladder --jobs full --rounds 3

Two jobs: pretraining the preset `tiny` on reviews of IMDb, and full fine-tuning of `minilm` on
snippets of Rotten Tomatoes, 32 a batch. Every rung keeps the changes of those below it. All rungs
train on the same sequences and take turns, there and back, so that noise falls on all alike. The
first ratio is the median of what a rung gained over the one below within a round, with the least
and the largest; the last what all of them gained. Padding is put in as tokens: that is the
arithmetic of padded code. On all rungs the process keeps freed memory, and a GELU is recomputed in
the backward pass, as in the scripts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minitune.model
from minitune.attention import resolve_backend
from minitune.batching import PackedBatch
from minitune.checkpoint import load_for_classification, load_tokenizer, read_config
from minitune.classification import TokenizedTexts
from minitune.corpus import Corpus
from minitune.data import Dataset, Reviews
from minitune.fast.layers import ByteDropout, pad_rows
from minitune.model import PRESETS, BertForMaskedLM
from minitune.support.model_names import find_model
from minitune.support.plots import plt, save
from minitune.support.runtime import Runtime, keep_freed_memory, multiplies_bf16

CPU = torch.device("cpu")
RATE, MASK = 0.15, 4  # the last special id of a tokenizer that train.py makes


@dataclass(frozen=True)
class Rung:
    """How a step is made."""

    name: str
    fused: bool = False  # AdamW in one kernel a tensor
    masked_only: bool = False  # the masked-LM head at the blanks, not at every token
    bytewise: bool = False  # dropout
    last_layer: bool = False  # computes no states that no head reads
    grouped: bool = False  # batches of alike lengths
    packed: bool = False  # no padding
    attention: str = "reference"
    precision: str = "fp32"
    padded_rows: bool = False  # so that matrices have few different numbers of rows


def rungs(job: str) -> list[Rung]:
    """From the bottom."""
    fastest = resolve_backend("auto", CPU, torch.float32, 64)
    changes = [("AdamW fused", {"fused": True})]
    if job == "mlm":
        changes += [("head at the blanks only", {"masked_only": True})]
    else:
        changes += [("dropout by bytes", {"bytewise": True})]
    read = "the blanks" if job == "mlm" else "[CLS]"
    changes += [(f"last layer for {read} only", {"last_layer": True})]
    changes += [("batches of alike lengths", {"grouped": True}), ("packing", {"packed": True})]
    changes += [(f"attention: {fastest}", {"attention": fastest})]
    if multiplies_bf16(CPU):
        changes += [("bf16, attention: reference", {"precision": "bf16", "attention": "reference"})]
        fastest = resolve_backend("auto", CPU, torch.bfloat16, 64)
        changes += [
            (f"few shapes, attention: {fastest}", {"padded_rows": True, "attention": fastest})
        ]
    ladder = [Rung("padded, float32, plain AdamW")]
    for name, change in changes:
        ladder.append(replace(ladder[-1], name=name, **change))
    return ladder


class Climber:
    """A model and its optimizer on one rung."""

    def __init__(self, job: str, rung: Rung, sequences: list[Tensor], labels: Tensor, batch: int):
        self.rung, self.sequences, self.labels = rung, sequences, labels
        torch.manual_seed(0)
        if job == "mlm":
            self.model = BertForMaskedLM(PRESETS["tiny"], rung.attention)
            self.loss = self.loss_of_blanks
        else:
            labels = {0: "negative", 1: "positive"}
            self.model, _ = load_for_classification(find_model("minilm"), labels, rung.attention)
            self.loss = self.loss_of_labels
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, ByteDropout) and not rung.bytewise:
                module.__class__ = nn.Dropout
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=rung.fused)
        order = np.random.default_rng(0).permutation(len(sequences))
        if rung.grouped:
            order = np.array(sorted(order, key=lambda row: len(sequences[row])))
        self.batches = np.array_split(order, -(-len(order) // batch))

    def pack(self, rows: np.ndarray) -> PackedBatch:
        """The batch, with padding where the rung has it."""
        chosen = [self.sequences[row] for row in rows]
        if not self.rung.packed:
            longest = max(map(len, chosen))
            chosen = [F.pad(sequence, (0, longest - len(sequence))) for sequence in chosen]
        return PackedBatch.from_sequences(chosen)

    def loss_of_blanks(self, rows: np.ndarray) -> Tensor:
        batch = self.pack(rows)
        ordinary = (batch.tokens > MASK).nonzero().squeeze(1)  # neither special nor padding
        order = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(0))
        positions = ordinary[order[: round(RATE * len(ordinary))]].sort().values
        labels = batch.tokens[positions]
        batch = replace(batch, tokens=batch.tokens.index_fill(0, positions, MASK))
        if self.rung.last_layer:
            return F.cross_entropy(self.model(batch, positions).float(), labels)
        hidden, targets = self.model.bert(batch), torch.full_like(batch.tokens, -100)
        targets[positions] = labels
        if self.rung.masked_only:
            hidden, targets = hidden[positions], labels
        logits = self.model.head(hidden, self.model.bert.embeddings.word.weight)
        return F.cross_entropy(logits.float(), targets)

    def loss_of_labels(self, rows: np.ndarray) -> Tensor:
        batch, model = self.pack(rows), self.model
        if self.rung.last_layer:
            pooled = model.pooler(model.bert(batch, batch.cls_positions), batch)
        else:
            pooled = torch.tanh(model.pooler.dense(model.bert(batch)[batch.cls_positions]))
        logits = model.classifier(model.dropout(pooled))
        return F.cross_entropy(logits.float(), self.labels[torch.from_numpy(rows)])

    def climb(self) -> float:
        """Seconds for all sequences once."""
        minitune.model.pad_rows = pad_rows if self.rung.padded_rows else lambda x: x
        started, runtime = time.perf_counter(), Runtime.start("cpu", self.rung.precision)
        for rows in self.batches:
            with runtime.autocast():
                loss = self.loss(rows)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - started


def problem(job: str, rows: int) -> tuple[list[Tensor], Tensor]:
    """Sequences as they come, and their labels."""
    if job == "mlm":
        chunks = Corpus.open(Dataset("imdb"), None, 8192).chunks("train", 256, overlap=False)
        chosen = np.random.default_rng(0).permutation(len(chunks))[:rows]
        return chunks.read(chosen), torch.zeros(rows)
    source = find_model("minilm")
    reviews = Reviews.load(Dataset("rotten_tomatoes"))
    chosen = np.random.default_rng(0).permutation(len(reviews.texts["train"]))[:rows]
    texts = [reviews.texts["train"][row] for row in chosen]
    ids = TokenizedTexts(texts, load_tokenizer(source, read_config(source)), 256).ids
    labels = reviews.labels["train"][torch.from_numpy(chosen)]
    return [torch.from_numpy(x).long() for x in ids], labels


JOBS = {
    "mlm": ("pretraining tiny, IMDb", 96, 24),
    "full": ("full fine-tuning, minilm, snippets", 256, 32),
}


def measure(job: str, rounds: int) -> Iterator[dict]:
    """The rungs from the bottom, each with its speed and what it gained."""
    what, rows, batch = JOBS[job]
    sequences, labels = problem(job, rows)
    tokens = sum(map(len, sequences))
    climbers = [Climber(job, rung, sequences, labels, batch) for rung in rungs(job)]
    seconds = [[] for _ in climbers]
    print(f"\n{what}: {tokens:,} tokens, {len(climbers[0].batches)} steps a round")
    for round_number in range(rounds + 1):
        order = range(len(climbers))
        for i in order if round_number % 2 else reversed(order):
            seconds[i].append(climbers[i].climb())
    seconds = [taken[1:] for taken in seconds]  # the first compiles kernels
    for i, climber in enumerate(climbers):
        below, taken = seconds[max(i - 1, 0)], seconds[i]
        gains = [old / new for old, new in zip(below, taken, strict=True)]
        in_all = [bottom / new for bottom, new in zip(seconds[0], taken, strict=True)]
        row = {
            "job": what,
            "rung": climber.rung.name,
            "tokens_per_second": tokens / statistics.median(seconds[i]),
            "gain": statistics.median(gains),
            "least": min(gains),
            "largest": max(gains),
            "in_all": statistics.median(in_all),
        }
        speed = f"{row['rung']:<30}{row['tokens_per_second']:9,.0f} tokens/s"
        gain = f"{row['gain']:7.2f} ({row['least']:.2f} to {row['largest']:.2f})"
        print(f"{speed}{gain}{row['in_all']:7.2f} in all", flush=True)
        yield row


def plot(rows: list[dict], title: str, path: Path) -> None:
    """A ladder for each job."""
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    size = 8, 2.6 * len(jobs)
    figure, panels = plt.subplots(len(jobs), 1, figsize=size, layout="constrained", squeeze=False)
    for (axes,), job in zip(panels, jobs, strict=True):
        ladder = [row for row in rows if row["job"] == job]
        speeds = [row["tokens_per_second"] for row in ladder]
        axes.barh(range(len(ladder)), speeds, color="#6baed6")
        for y, row in enumerate(ladder):
            text = f" {speeds[y]:,.0f}" + (f"   × {row['gain']:.2f}" if y else "")
            if y == len(ladder) - 1:
                text += f"   (× {row['in_all']:.1f} in all)"
            axes.text(speeds[y], y, text, va="center", fontsize=9)
        names = [ladder[0]["rung"], *(f"+ {row['rung']}" for row in ladder[1:])]
        axes.set_yticks(range(len(ladder)), names)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.5 * max(speeds)), xlabel="tokens a second, padding not counted")
        axes.set_title(job)
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def main() -> None:
    """A line for each rung."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=[*JOBS])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw a picture too")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    args = parser.parse_args()
    keep_freed_memory()
    machine = Runtime.start("cpu", "fp32").describe()
    print(f"{machine}, torch {torch.__version__}")
    rows = [row for job in args.jobs for row in measure(job, args.rounds)]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(rows, machine, args.plot)


if __name__ == "__main__":
    main()
