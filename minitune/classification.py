"""Classifying texts as a task for the training loop: examples, their batches, loss and validation.

One task for every fine-tuning method. What differs is what an example is: a token sequence that the
whole network reads (Sequences), or the features of a frozen encoder (features.Features).
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.batching import PackedBatch, shuffled_batches, sorted_batches
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer

HEAD_SHARE = 0.25  # of a text that is cut, this much from its beginning and the rest from its end


class Inputs(Protocol):
    """What a classifier reads, one entry a text."""

    lengths: np.ndarray  # (N,) how much each entry counts in a batch
    unit: str  # of that

    def pack(self, indices: np.ndarray) -> PackedBatch | Tensor:
        """These entries as the model's input."""


class Sequences:
    """Texts as token ids with [CLS] and [SEP], at most `max_len` each.

    A longer text keeps its beginning and its end, where reviewers say what they think (Sun et al.
    2019, "How to Fine-Tune BERT for Text Classification?", section 5.3.1).
    """

    unit = "tokens"

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, max_len: int):
        room = max_len - 2
        head = round(HEAD_SHARE * room)
        self.ids, self.truncated = [], []
        for ids in tokenizer.encode(list(texts)):
            self.truncated.append(len(ids) > room)
            if len(ids) > room:
                ids = ids[:head] + ids[len(ids) - (room - head) :]
            self.ids.append(np.array(tokenizer.frame(ids), dtype=np.int32))
        self.lengths = np.array([len(ids) for ids in self.ids], dtype=np.int64)

    def select(self, indices: np.ndarray) -> "Sequences":
        """Only these texts."""
        chosen = copy.copy(self)
        chosen.ids = [self.ids[i] for i in indices]
        chosen.truncated = [self.truncated[i] for i in indices]
        chosen.lengths = self.lengths[indices]
        return chosen

    def pack(self, indices: np.ndarray) -> PackedBatch:
        """These texts as a packed batch."""
        return PackedBatch.from_sequences([torch.from_numpy(self.ids[i]) for i in indices])


@dataclass
class Examples:
    """Inputs and the index of each one's label."""

    inputs: Inputs
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def tokens(self) -> int:
        """In all of them."""
        return int(self.inputs.lengths.sum())

    def select(self, indices: np.ndarray) -> "Examples":
        """Only these examples."""
        return Examples(self.inputs.select(indices), self.labels[torch.from_numpy(indices)])

    def batch(self, indices: np.ndarray) -> "Batch":
        """These examples as a batch."""
        return Batch(self, indices)

    def batches(self, batch_tokens: int) -> list["Batch"]:
        """All examples once, sorted by length."""
        return [
            self.batch(indices) for indices in sorted_batches(self.inputs.lengths, batch_tokens)
        ]


@dataclass
class Batch:
    """Some of the examples, packed only on their way to the device."""

    examples: Examples
    indices: np.ndarray

    def __len__(self) -> int:
        """How many predictions the loss is a mean over."""
        return len(self.indices)

    @property
    def tokens(self) -> int:
        """How many tokens are read."""
        return int(self.examples.inputs.lengths[self.indices].sum())

    def split(self, parts: int) -> list["Batch"]:
        """Shares of about equal size; their lengths are alike, as in every batch. None is empty."""
        shares = np.array_split(self.indices, min(parts, len(self)))
        return [Batch(self.examples, share) for share in shares]

    def to(self, device: torch.device) -> tuple[PackedBatch | Tensor, Tensor]:
        """(the model's input, the labels) on a device."""
        labels = self.examples.labels[torch.from_numpy(self.indices)]
        return self.examples.inputs.pack(self.indices).to(device), labels.to(device)


class Classification:
    """Tell the label of a text. Steps are whole epochs; the best one by validation is kept."""

    def __init__(
        self, train: Examples, validation: Examples, *, batch_tokens: int, epochs: int, seed: int
    ):
        self.train, self.validation = train, validation
        self.batch_tokens, self.seed = batch_tokens, seed
        shares = torch.bincount(validation.labels) / len(validation)
        entropy = -(shares[shares > 0] * shares[shares > 0].log()).sum()
        self.yardstick = f"always the same answer: accuracy {shares.max():.3f}, loss {entropy:.3f}"
        self.unit = train.inputs.unit
        self.validation_tokens = int(validation.inputs.lengths.sum()) * epochs
        # An epoch has not always the same number of batches: they are filled anew from shuffled
        # rows.
        self.epoch_ends, step = [], 0
        rows = 0
        for indices in shuffled_batches(train.inputs.lengths, batch_tokens, seed):
            rows, step = rows + len(indices), step + 1
            if rows == len(train):
                self.epoch_ends.append(step)
                rows = 0
                if len(self.epoch_ends) == epochs:
                    break

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.epoch_ends[-1]

    def evaluation_due(self, step: int, steps: int) -> bool:
        """At the end of each epoch."""
        return step in self.epoch_ends

    def score(self, metrics: dict) -> tuple[float, float]:
        """What the best epoch has the most of: accuracy, and among equals certainty."""
        return metrics["accuracy"], -metrics["loss"]

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The training batch of each step from `first_step` on; a step always has the same one."""
        for indices in shuffled_batches(
            self.train.inputs.lengths, self.batch_tokens, self.seed, skip=first_step
        ):
            yield self.train.batch(indices)

    def loss(self, model: nn.Module, batch: tuple) -> Tensor:
        """Sum over the texts of -log p(label), in nats and float32."""
        inputs, labels = batch
        return F.cross_entropy(model(inputs).float(), labels, reduction="sum")

    def evaluate(self, model: nn.Module, runtime: Runtime, quick: bool = False) -> dict:
        """Mean loss and accuracy on the validation rows, over all processes; never on a part of them."""
        return evaluate(model, self.validation, self.batch_tokens, runtime)


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples, batch_tokens: int, runtime: Runtime) -> dict:
    """`accuracy` and mean `loss` of a classifier; batches are shared out over the processes."""
    totals = torch.zeros(3, dtype=torch.float64)  # loss, right answers, answers
    for batch in examples.batches(batch_tokens)[runtime.rank :: runtime.world_size]:
        inputs, labels = batch.to(runtime.device)
        logits = model(inputs).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(-1) == labels).sum()
        totals += torch.tensor([loss.item(), right.item(), len(batch)], dtype=torch.float64)
    loss, right, answers = runtime.sum(totals).tolist()
    return {"accuracy": right / answers, "loss": loss / answers}
