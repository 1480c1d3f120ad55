"""Fine-tuning with a second task: guess masked words while learning to classify.

A few thousand labels say little, and a network learns its training rows by heart. So it goes on
with pretraining meanwhile: some tokens of each batch are masked, the classifier reads the texts so,
and the masked-LM head guesses the tokens. The weight of the second loss falls to zero, so that the
labels have the last word (Chronopoulou et al. 2019, "An Embarrassingly Simple Approach
for Transfer Learning from Pretrained Language Models").

`--masked-words WEIGHT` of finetune.py. The head is that of the pretrained model and stays as it is,
but for its last matrix: it is that of the word vectors, which learn from every guess.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from minitune.batching import PackedBatch, copy_to
from minitune.checkpoint import load_with_head
from minitune.classification import Classification
from minitune.fast.layers import pad_rows
from minitune.model import BertForSequenceClassification, MaskedLMHead
from minitune.pretraining import MaskedBatch
from minitune.tokenizer import Tokenizer

RATE = 0.15  # of the tokens are masked, as in BERT: the classifier needs most of them


def head_of(source: Path) -> MaskedLMHead:
    """The masked-LM head of a pretrained model, frozen; UserError where it has none."""
    return load_with_head(source, "--masked-words").head.requires_grad_(False)


@dataclass
class MaskedExamples:
    """A batch for both tasks: texts with masked tokens, and a label for each text."""

    masked: MaskedBatch
    labels: Tensor  # as in Examples
    factor: float  # of the second loss, for each masked token

    def __len__(self) -> int:
        """How many texts: the loss is a mean over them."""
        return len(self.labels)

    @property
    def tokens(self) -> int:
        """How many tokens the model reads."""
        return self.masked.tokens

    def split(self, parts: int) -> list["MaskedExamples"]:
        """Up to `parts` batches of whole texts, about equal in tokens; none is empty."""
        batches = self.masked.split(parts)
        labels = self.labels.split([len(part.batch.cls_positions) for part in batches])
        pairs = zip(batches, labels, strict=True)
        return [MaskedExamples(masked, some, self.factor) for masked, some in pairs]

    def to(self, device: torch.device) -> tuple[tuple[PackedBatch, Tensor, Tensor, float], Tensor]:
        """((batch, positions, words at these positions, factor), labels) on a device."""
        (batch, positions), words = self.masked.to(device)
        return (batch, positions, words, self.factor), *copy_to(device, self.labels)


class ClassificationAndMaskedWords(Classification):
    """Classification, whose training batches have masked words to guess; validation has none."""

    def __init__(self, *examples, tokenizer: Tokenizer, head: MaskedLMHead, weight: float, **plan):
        """`weight` is that of the second loss at the first step; the rest as Classification."""
        super().__init__(*examples, **plan)
        self.tokenizer, self.head, self.weight = tokenizer, head, weight

    def batches(self, first_step: int) -> Iterator[MaskedExamples]:
        """The batch of each step from `first_step` on; a step has the same one in every run."""
        for step, examples in enumerate(super().batches(first_step), start=first_step):
            generator = Generator().manual_seed(self.seed * 1_000_003 + step)
            batch = examples.inputs.pack()
            masked = MaskedBatch.of(batch, self.tokenizer, generator, RATE, whole_word=False)
            # Each loss is a mean: one over texts, one over masked tokens.
            factor = self.weight * (1 - step / self.steps) * len(examples) / max(len(masked), 1)
            yield MaskedExamples(masked, examples.labels, factor)

    def loss(
        self, model: BertForSequenceClassification, inputs: tuple, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(both losses, to be minimised; that of the labels), sums in nats."""
        batch, positions, words, factor = inputs
        cls = model.pooler.positions(batch)
        if cls is None:  # the pooler reads all tokens
            for_label = model.bert(batch)
            for_words = for_label.index_select(0, positions)
        else:
            hidden = model.bert.at(batch, torch.cat([cls, positions]))
            for_label, for_words = hidden.split([len(cls), len(positions)])
        minimised, reported = self.compare(model.classify(for_label, batch).float(), labels)
        guesses = self.head(pad_rows(for_words), model.bert.embeddings.word.weight)
        guesses = guesses[: len(words)].float()
        return minimised + factor * F.cross_entropy(guesses, words, reduction="sum"), reported
