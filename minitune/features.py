"""Feature extraction: a frozen encoder reads each text once, a linear classifier learns from it.

A text becomes one vector, its features: for each layer the mean of the hidden states over the
text's tokens, and their standard deviation, side by side. Layers represent different things; which
of them knows about sentiment is for the classifier to find out.
"""

import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from minitune.batching import PackedBatch, fill_batches, reading_tokens
from minitune.classification import TokenizedTexts
from minitune.model import Bert, mean_of_tokens
from minitune.support.errors import UserError
from minitune.support.runs import write_tensors
from minitune.support.runtime import Runtime

BLOCK = 1024  # texts in a file of features; after a kill only one file is computed again


class Features:
    """The features of each text, as the input of a FeatureHead: one row a text."""

    unit = "texts"

    def __init__(self, matrix: Tensor):
        self.matrix = matrix  # (N, F)
        self.lengths = np.ones(len(matrix), dtype=np.int64)  # a row counts as one token

    def select(self, indices: np.ndarray) -> "Features":
        """Only these rows."""
        return Features(self.matrix[torch.from_numpy(indices)])

    def pack(self) -> Tensor:
        """All rows (N, F)."""
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
        """Take mean and deviation of each feature from those (N, F) of the training rows."""
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0, correction=0).clamp_min(1e-6))

    @torch.no_grad()
    def start_with_frequencies(self, labels: Tensor) -> None:
        """Let the bias give each label the probability that it has in `labels` (N,).

        Standardised features have mean zero, so only the bias can say that a label is rare; at the
        small learning rate of features it would need thousands of steps for that.
        """
        counts = torch.bincount(labels, minlength=len(self.classifier.bias)).clamp_min(1)
        self.classifier.bias.copy_((counts / len(labels)).log())

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):  # cheap, so in float32
            return self.classifier((features.float() - self.mean) / self.std)


class FeatureClassifier(nn.Module):
    """Frozen encoder and trained head as one model: a packed batch in, logits (B, labels) out."""

    pooling, temperature = "layers", 1.0

    def __init__(self, bert: Bert, labels: int):
        super().__init__()
        self.bert = bert
        self.head = FeatureHead(feature_size(bert), labels)

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.head(pooled_layers(self.bert, batch))


def feature_size(bert: Bert) -> int:
    """F, the length of a text's vector."""
    return 2 * (len(bert.layers) + 1) * bert.config.hidden_size


def pooled_layers(bert: Bert, batch: PackedBatch) -> Tensor:
    """(B, F): mean and deviation over each text's tokens, of the embeddings and of each layer."""
    states, pooled = [bert.embeddings(batch)], []
    for layer in bert.layers:
        states.append(layer(states[-1], batch))
    for x in states:
        x = x[: batch.tokens.numel()]  # without the rows of pad_rows
        mean = mean_of_tokens(x, batch)
        variance = mean_of_tokens(x.float().square(), batch) - mean.square()
        # Rounding may take a variance to zero, where a root has no gradient, or below.
        pooled += [mean, variance.clamp_min(1e-20).sqrt()]
    return torch.cat(pooled, dim=1)


def read_block(bert: Bert, inputs: TokenizedTexts, block: np.ndarray, runtime: Runtime) -> Tensor:
    """Features of the texts with these indices, in that order."""
    rows = []
    for indices in fill_batches(block, inputs.lengths, reading_tokens(runtime.device)):
        batch = inputs.select(indices).pack().to(runtime.device)
        with runtime.autocast():
            rows.append(pooled_layers(bert, batch).float().cpu())
    return torch.cat(rows)


@torch.no_grad()
def extract(
    bert: Bert, inputs: TokenizedTexts, prefix: Path, runtime: Runtime
) -> tuple[Tensor, float]:
    """Features (N, F) of N texts, in their order, and the seconds that it took.

    Each block of texts becomes a file, "PREFIX-00000.safetensors" and so on. A block that is on
    disk is not computed again, so a killed run continues. Several processes share the blocks.
    Raises UserError for a damaged file.
    """
    bert.eval()
    order = np.argsort(inputs.lengths, kind="stable")  # so that batches have texts of like length
    starts = range(0, len(order), BLOCK)
    blocks = {Path(f"{prefix}-{i // BLOCK:05d}.safetensors"): order[i : i + BLOCK] for i in starts}
    mine = list(blocks)[runtime.rank :: runtime.world_size]
    for path in runtime.progress(mine, desc=prefix.name):
        if not path.is_file():
            started = time.monotonic()
            features = read_block(bert, inputs, blocks[path], runtime)
            seconds = torch.tensor(time.monotonic() - started)
            write_tensors(path, {"features": features, "seconds": seconds}, {})
    runtime.barrier()  # now all blocks are on disk
    matrix, seconds = torch.empty(len(order), feature_size(bert)), 0.0
    for path, block in blocks.items():
        try:
            saved = load_file(path)
            matrix[torch.from_numpy(block)] = saved["features"]
            seconds += saved["seconds"].item()
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise UserError(f"{path} is damaged: delete it, then --resume") from error
    return matrix, seconds / runtime.world_size
