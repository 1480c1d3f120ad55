"""Text classification as a task for the training loop: examples, their batches, and the loss.

Where the classification head is trained: `Classification.loss` compares its logits with the labels,
and training.Trainer follows the gradient of that loss. The head is the `classifier` of
model.BertForSequenceClassification, or features.FeatureHead. Every fine-tuning method has this
task; the methods differ in which other parameters learn (methods.METHODS).
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.batching import PackedBatch, copy_to, shuffled_batches, sorted_batches
from minitune.tokenizer import Tokenizer

BEGINNING_SHARE = 0.25  # of what is kept of a long text; the rest is from its end


class TokenizedTexts:
    """Texts as token ids with [CLS] and [SEP], at most `max_len` each.

    A longer text keeps its beginning and its end, where reviewers say what they think (Sun et al.
    2019, "How to Fine-Tune BERT for Text Classification?", section 5.3.1); `beginning` is the share
    of the first.
    """

    unit = "tokens"  # of the lengths

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        max_len: int,
        beginning: float = BEGINNING_SHARE,
    ):
        room = max_len - 2
        head = round(beginning * room)
        self.ids, self.truncated = [], []
        for ids in tokenizer.encode(list(texts)):
            self.truncated.append(len(ids) > room)
            if len(ids) > room:
                ids = ids[:head] + ids[len(ids) - (room - head) :]
            self.ids.append(np.array(tokenizer.frame(ids), dtype=np.int32))
        self.lengths = np.array([len(ids) for ids in self.ids], dtype=np.int64)

    def select(self, indices: np.ndarray) -> "TokenizedTexts":
        """Only these texts, in this order."""
        chosen = copy.copy(self)
        chosen.ids, chosen.lengths = [self.ids[i] for i in indices], self.lengths[indices]
        chosen.truncated = [self.truncated[i] for i in indices]
        return chosen

    def pack(self) -> PackedBatch:
        """All texts in one packed batch."""
        return PackedBatch.from_sequences([torch.from_numpy(ids) for ids in self.ids])


@dataclass
class Examples:
    """Inputs and their labels: a whole split, or the few of a batch."""

    inputs: TokenizedTexts  # or features.Features, vectors with the same methods
    labels: Tensor  # (N,) int64, indices into id2label; or (N, L), a probability of each label

    def __len__(self) -> int:
        """N, how many predictions the loss is a mean over."""
        return len(self.labels)

    @property
    def tokens(self) -> int:
        """The sum of all lengths."""
        return int(self.inputs.lengths.sum())

    def select(self, indices: np.ndarray) -> "Examples":
        """Only these examples, in this order."""
        return Examples(self.inputs.select(indices), self.labels[torch.from_numpy(indices)])

    def batches(self, batch_tokens: int) -> list["Examples"]:
        """All examples once, sorted by length, in batches of at most this many tokens."""
        return [self.select(rows) for rows in sorted_batches(self.inputs.lengths, batch_tokens)]

    def split(self, parts: int) -> list["Examples"]:
        """At most this many shares, about equal in examples; none is empty."""
        shares = np.array_split(np.arange(len(self)), min(parts, len(self)))
        return [self.select(share) for share in shares]

    def to(self, device: torch.device) -> tuple[tuple[PackedBatch | Tensor], Tensor]:
        """(the model's arguments, labels) on a device; only here are the inputs packed."""
        return (self.inputs.pack().to(device),), *copy_to(device, self.labels)


class Classification:
    """The task to tell the label of a text. It takes whole epochs, and the best of them is kept."""

    def __init__(
        self,
        train: Examples,
        validation: Examples,
        *,
        batch_tokens: int,
        epochs: int,
        seed: int,
        class_weights: str = "none",
        start_counts: bool = False,
    ):
        """`class_weights`: "balanced" lets all labels count alike in the loss, rare ones too.

        `start_counts`: the weights before the first step may be the best.
        """
        self.start_counts = start_counts
        self.train, self.validation = train, validation
        self.batch_tokens, self.seed, self.unit = batch_tokens, seed, train.inputs.unit
        self.weights = None
        if class_weights == "balanced":
            counts = torch.bincount(train.labels)  # (L,)
            # Their mean over the rows is 1, so that the learning rate keeps its meaning.
            self.weights = len(train) / (counts.count_nonzero() * counts.clamp_min(1))
        shares = torch.bincount(validation.labels) / len(validation)
        entropy = -(shares[shares > 0] * shares[shares > 0].log()).sum()
        self.baseline = f"always the same answer: accuracy {shares.max():.3f}, loss {entropy:.3f}"
        self.epoch_ends = self._epoch_ends(epochs)
        self.steps = self.epoch_ends[-1]

    def _epoch_ends(self, epochs: int) -> list[int]:
        """The last step of each epoch. Epochs differ in steps, as texts differ in length."""
        ends, rows = [], 0
        for step, indices in enumerate(self._shuffled(), start=1):
            rows += len(indices)
            if rows == (len(ends) + 1) * len(self.train):
                ends.append(step)
            if len(ends) == epochs:
                return ends

    def _shuffled(self, skip: int = 0) -> Iterator[np.ndarray]:
        return shuffled_batches(self.train.inputs.lengths, self.batch_tokens, self.seed, skip)

    def batches(self, first_step: int) -> Iterator[Examples]:
        """The batch of each step from `first_step` on; a step has the same one in every run."""
        return map(self.train.select, self._shuffled(skip=first_step))

    def loss(self, model: nn.Module, inputs: tuple, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(what is minimised, what is reported): sums of -log p(label), in nats."""
        return self.compare(model(*inputs).float(), labels)

    def compare(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The two losses of logits (B, L); only the first has class weights."""
        loss = F.cross_entropy(logits, labels, reduction="sum")
        if self.weights is None:
            return loss, loss
        self.weights = self.weights.to(labels.device)  # copied to a GPU once
        return F.cross_entropy(logits, labels, self.weights, reduction="sum"), loss

    def evaluation_due(self, step: int, steps: int) -> bool:
        """At the end of each epoch."""
        return step in self.epoch_ends

    def validation_batches(self, quick: bool) -> list[Examples]:
        """Of all validation rows, always: the best epoch is chosen by them."""
        return self.validation.batches(self.batch_tokens)

    def score(self, metrics: dict) -> tuple[float, float]:
        """The best epoch has the highest accuracy, and among equals the smallest loss.

        Where the start counts, it has the smallest loss: it is compared with answers that are good
        already, and the accuracy of few rows does not see so small a difference.
        """
        if self.start_counts:
            return -metrics["loss"], metrics["accuracy"]
        return metrics["accuracy"], -metrics["loss"]
