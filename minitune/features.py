"""Feature extraction: a frozen encoder reads every text once, and a small head learns from what it said.

A text becomes one vector: for each layer the mean of the hidden states over its tokens, and their
standard deviation, side by side. Layers see different things, and which of them knows about
sentiment is for the head to find out.
"""

import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from minitune.batching import PackedBatch, filled, reading_tokens
from minitune.classification import Examples, Sequences
from minitune.model import Bert, mean_of_tokens
from minitune.support.errors import UserError
from minitune.support.runs import write_tensors
from minitune.support.runtime import Runtime

BLOCK = 1024  # texts in a file of features; a kill loses the work on one


class Features:
    """What a frozen encoder said of each text, as the input of a head."""

    unit = "texts"

    def __init__(self, matrix: Tensor):
        self.matrix = matrix  # (N, F)
        self.lengths = np.ones(len(matrix), dtype=np.int64)  # a batch of n "tokens" is n rows

    def select(self, indices: np.ndarray) -> "Features":
        """Only these rows."""
        return Features(self.matrix[torch.from_numpy(indices)])

    def pack(self) -> Tensor:
        """All rows."""
        return self.matrix


class FeatureHead(nn.Module):
    """Standardised features, then one linear map: (B, F) to (B, labels)."""

    def __init__(self, size: int, labels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.classifier = nn.Linear(size, labels)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def standardise(self, features: Tensor) -> None:
        """Take mean and spread of every feature from the training rows."""
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0, correction=0).clamp_min(1e-6))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):  # cheap, so in float32
            return self.classifier((features.float() - self.mean) / self.std)


class FeatureClassifier(nn.Module):
    """Frozen encoder and trained head as one: a packed batch in, logits (B, labels) out."""

    def __init__(self, bert: Bert, labels: int):
        super().__init__()
        self.bert = bert
        self.head = FeatureHead(feature_size(bert), labels)

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.head(pooled_layers(self.bert, batch))


def feature_size(bert: Bert) -> int:
    """F, the numbers in a text's vector."""
    return 2 * (len(bert.layers) + 1) * bert.config.hidden_size


def pooled_layers(bert: Bert, batch: PackedBatch) -> Tensor:
    """(B, F): mean and deviation over the tokens of each text, of the embeddings and of each layer."""
    x = bert.embeddings(batch)
    states = [x]
    for layer in bert.layers:
        x = layer(x, batch)
        states.append(x)
    pooled = []
    for x in states:
        x = x[: batch.tokens.numel()]
        mean = mean_of_tokens(x, batch)
        variance = mean_of_tokens(x.float().square(), batch) - mean.square()
        pooled += [mean, variance.clamp_min(0).sqrt()]  # rounding may take a variance below zero
    return torch.cat(pooled, dim=1)


def extract(
    bert: Bert,
    examples: dict[str, Examples],
    directory: Path,
    runtime: Runtime,
) -> tuple[dict[str, Examples], float]:
    """The examples of each split with features as inputs, and the seconds that the training rows took.

    Blocks of texts that `directory` holds already are not done again: a killed run goes on.
    """
    bert.eval()
    extracted, seconds = {}, {}
    for split, own in examples.items():
        prefix = directory / f"{split}-features"
        matrix, seconds[split] = _extract(bert, own.inputs, prefix, runtime)
        extracted[split] = Examples(Features(matrix), own.labels)
    return extracted, seconds["train"]


@torch.no_grad()
def _extract(
    bert: Bert, sequences: Sequences, prefix: Path, runtime: Runtime
) -> tuple[Tensor, float]:
    """(N, F) features, and the seconds. Processes take turns in doing a block; each reads all of them."""
    order = np.argsort(sequences.lengths, kind="stable")
    blocks = [order[i : i + BLOCK] for i in range(0, len(order), BLOCK)]
    paths = [prefix.with_name(f"{prefix.name}-{i:05d}.safetensors") for i in range(len(blocks))]
    mine = range(runtime.rank, len(blocks), runtime.world_size)
    bar = tqdm(mine, desc=prefix.name, disable=None if runtime.is_main else True)
    for i in bar:
        if paths[i].is_file():
            continue
        started, parts = time.monotonic(), []
        for indices in filled(blocks[i], sequences.lengths, reading_tokens(runtime.device)):
            batch = sequences.select(indices).pack().to(runtime.device)
            with runtime.autocast():
                parts.append(pooled_layers(bert, batch).float().cpu())
        seconds = str(time.monotonic() - started)
        write_tensors(paths[i], {"features": torch.cat(parts)}, {"seconds": seconds})
    runtime.barrier()  # now all blocks are there
    matrix, seconds = torch.empty(len(order), feature_size(bert)), 0.0
    for path, block in zip(paths, blocks, strict=True):
        try:
            with safe_open(path, "pt") as file:
                matrix[torch.from_numpy(block)] = file.get_tensor("features")
                seconds += float(file.metadata()["seconds"])
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"{path} is damaged: delete it, and --resume makes it anew") from error
    return matrix, seconds / runtime.world_size
