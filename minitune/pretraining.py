"""Masked-language modelling as a task for the training loop: its batches and its two losses.

The first loss is BERT's: guess the masked tokens (masking.py). The second one: guess all words of a
sequence, in any order, from its [CLS] alone. So the vector of [CLS] must gather what the text is
about. Fine-tuning reads this vector, and guessing masked tokens does not train it.

The second loss is the bag of words of Le & Mikolov 2014 (PV-DBOW), which Ma et al. 2024 ("Drop your
Decoder: Pre-training with Bag-of-Word Prediction") add to a BERT.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from minitune.batching import PackedBatch, copy_to, fill_batches, shuffled_batches
from minitune.corpus import Corpus
from minitune.masking import mask_tokens
from minitune.tokenizer import Tokenizer

MASK_RATE = 0.3  # of train.py, where --mask-rate is not given
VALIDATION_RATE = 0.15  # BERT's, for validation in all runs, so that their losses compare
VALIDATION_TOKENS = 1 << 19  # if there are more, an evenly spread part of them is read
EVALUATIONS = 12  # quick ones, during a run
QUICK = 8  # a quick evaluation reads every 8th validation batch


@dataclass
class MaskedBatch:
    """A packed batch with masked tokens, and the ids that are to be guessed."""

    batch: PackedBatch
    positions: Tensor  # (M,) int64, ascending: which tokens are to be guessed
    labels: Tensor  # (M,) int64: the ids of these tokens before masking

    @classmethod
    def of(
        cls,
        batch: PackedBatch,
        tokenizer: Tokenizer,
        generator: Generator,
        rate: float,
        whole_word: bool,
    ) -> "MaskedBatch":
        """The batch with `rate` of its tokens masked."""
        masked = mask_tokens(batch.tokens, tokenizer, generator, rate, whole_word)
        tokens, positions, labels = masked
        return cls(replace(batch, tokens=tokens), positions, labels)

    def __len__(self) -> int:
        """M, the number of predictions."""
        return self.labels.numel()

    @property
    def tokens(self) -> int:
        """T, the number of tokens that the model reads."""
        return self.batch.tokens.numel()

    def split(self, parts: int) -> list["MaskedBatch"]:
        """Up to `parts` batches of whole sequences, about equal in tokens; none is empty."""
        cu, batches = self.batch.cu_seqlens, []
        sequences = self.batch.tokens.split(cu.diff().tolist())
        # Cut where the tokens so far come to 1/parts of all, 2/parts, …
        targets = torch.arange(1, parts) * self.tokens // parts
        cuts = torch.searchsorted(cu, targets.to(cu.dtype)).tolist()
        for first, last in pairwise(sorted({0, *cuts, len(sequences)})):
            batch = PackedBatch.from_sequences(sequences[first:last])
            inside = (self.positions >= cu[first]) & (self.positions < cu[last])
            positions = self.positions[inside] - cu[first]
            batches.append(MaskedBatch(batch, positions, self.labels[inside]))
        return batches

    def to(self, device: torch.device) -> tuple[tuple[PackedBatch, Tensor], Tensor]:
        """((batch, positions), labels) on a device: the arguments of the model, and the labels."""
        positions, labels = copy_to(device, self.positions, self.labels)
        return (self.batch.to(device), positions), labels


class MaskedLanguageModelling:
    """Guess the masked tokens of a corpus. As a task it has what training.py lists."""

    unit, evaluations = "tokens", EVALUATIONS  # the latter for support/plan.py
    start_counts = False
    score = None  # the last weights are kept: the learning rate has fallen to zero there

    def __init__(
        self,
        corpus: Corpus,
        *,
        max_len: int,
        batch_tokens: int,
        rate: float,
        whole_word: bool,
        seed: int,
        summary_weight: float = 1.0,
    ):
        """`rate` is the share of tokens to mask, `summary_weight` the factor of the second loss."""
        self.tokenizer, self.batch_tokens, self.seed = corpus.tokenizer, batch_tokens, seed
        self.rate, self.whole_word, self.summary_weight = rate, whole_word, summary_weight
        self.special_ids, self.pad = self.tokenizer.special_ids, self.tokenizer.pad_id
        self.train = corpus.chunks("train", max_len, overlap=True)
        # Losses to compare with, in nats: all tokens equally likely, or guessed by frequency alone.
        self.uniform, self.unigram = math.log(self.tokenizer.vocab_size), corpus.unigram_entropy()
        self.baseline = f"ln V {self.uniform:.2f}, words alone {self.unigram:.2f}"

        # Without overlap, so that each token counts once; all runs mask the same places.
        self.held_out = corpus.chunks("validation", max_len, overlap=False)
        lengths, generator = self.held_out.lengths, Generator().manual_seed(0)
        order = np.arange(0, len(lengths), -(-int(lengths.sum()) // VALIDATION_TOKENS))
        order = order[np.argsort(lengths[order], kind="stable")]
        self.validation = [
            self.mask(self.held_out.read(indices), generator, VALIDATION_RATE, whole_word=False)
            for indices in fill_batches(order, lengths, batch_tokens)
        ]

    def batches(self, first_step: int) -> Iterator[MaskedBatch]:
        """The batch of each step from `first_step` on; a step has the same one in every run."""
        order = shuffled_batches(self.train.lengths, self.batch_tokens, self.seed, skip=first_step)
        for step, indices in enumerate(order, start=first_step):
            generator = Generator().manual_seed(self.seed * 1_000_003 + step)
            yield self.mask(self.train.read(indices), generator, self.rate, self.whole_word)

    def mask(
        self, sequences: list[Tensor], generator: Generator, rate: float, whole_word: bool
    ) -> MaskedBatch:
        """A batch of these sequences of ids, each (n,), with this share of their tokens masked."""
        batch = PackedBatch.from_sequences(sequences)
        return MaskedBatch.of(batch, self.tokenizer, generator, rate, whole_word)

    def loss(self, model: nn.Module, inputs: tuple, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(both losses, to be minimised; that of the masked tokens), float32 sums in nats."""
        batch, positions = inputs
        logits = model(batch, torch.cat([positions, batch.cls_positions])).float()
        masked_logits, cls_logits = logits.split([len(positions), len(batch.cls_positions)])
        # No blank hides a [PAD]: such a label only fills a batch up (fast/graphs.py).
        masked_loss = F.cross_entropy(masked_logits, labels, ignore_index=self.pad, reduction="sum")
        tokens = batch.tokens.scatter(0, positions, labels)  # as they were before masking
        bag_loss = self.bag_of_words_loss(cls_logits, tokens, batch.sequence_ids)
        # The bag is a sum over all words, the masked loss over `rate` of them.
        return masked_loss + self.rate * self.summary_weight * bag_loss, masked_loss

    def bag_of_words_loss(self, logits: Tensor, tokens: Tensor, sequence_ids: Tensor) -> Tensor:
        """-log p(word) by the logits (B, V) of each [CLS], summed over all words of `tokens` (T,).

        A word is guessed from its sequence alone, so that one softmax serves all its words.
        """
        self.special_ids = self.special_ids.to(tokens.device)  # copied to a GPU once
        is_word = ~torch.isin(tokens, self.special_ids)
        return -(logits.log_softmax(-1)[sequence_ids, tokens] * is_word).sum()

    def evaluation_due(self, step: int, steps: int) -> bool:
        """12 times in a run, but not after the last step: all rows are evaluated then."""
        return step % max(1, steps // EVALUATIONS) == 0 and step < steps

    def validation_batches(self, quick: bool) -> list[MaskedBatch]:
        """All of them; if `quick`, every 8th."""
        return self.validation[:: QUICK if quick else 1]
