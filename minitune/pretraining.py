"""Masked-language modelling as a task for the training loop: its batches, its loss, its validation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.batching import PackedBatch, filled, shuffled_batches
from minitune.corpus import Corpus
from minitune.masking import mask_tokens
from minitune.model import BertForMaskedLM
from minitune.support.runtime import Runtime

VALIDATION_RATE = 0.15  # whatever the training rate is, so that runs can be compared
VALIDATION_TOKENS = 1 << 19  # of a large corpus, an evenly spread part is enough
EVALUATIONS = 12  # quick ones, over a run
QUICK = 8  # quick: every 8th validation batch


@dataclass
class MaskedBatch:
    """A packed batch with masked tokens, and the tokens that stood there."""

    batch: PackedBatch
    positions: Tensor  # (M,) of the masked tokens, indices into the packed ones, ascending
    labels: Tensor  # (M,) int64, the ids that stood there

    def __len__(self) -> int:
        """How many predictions the loss is a mean over."""
        return self.labels.numel()

    @property
    def tokens(self) -> int:
        """How many tokens are read."""
        return self.batch.tokens.numel()

    def split(self, parts: int) -> list["MaskedBatch"]:
        """Contiguous shares of whole sequences, about equal in tokens; never an empty one."""
        cu, T = self.batch.cu_seqlens, self.tokens
        targets = torch.arange(1, parts) * T // parts
        cuts = torch.searchsorted(cu, targets.to(cu.dtype)).tolist()
        bounds = sorted({0, *cuts, cu.numel() - 1})
        return [self._sequences(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]

    def _sequences(self, first: int, last: int) -> "MaskedBatch":
        cu = self.batch.cu_seqlens[first : last + 1]
        start, stop = cu[0].item(), cu[-1].item()
        inside = (self.positions >= start) & (self.positions < stop)
        lengths = cu - cu[0]
        batch = PackedBatch(self.batch.tokens[start:stop], lengths, int(lengths.diff().max()))
        return MaskedBatch(batch, self.positions[inside] - start, self.labels[inside])

    def to(self, device: torch.device) -> tuple[tuple[PackedBatch, Tensor], Tensor]:
        """(the model's arguments, labels) on a device."""
        return (self.batch.to(device), self.positions.to(device)), self.labels.to(device)


class MaskedLanguageModelling:
    """Guess the hidden words of a corpus."""

    unit = "tokens"

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
        self.corpus, self.tokenizer = corpus, corpus.tokenizer
        self.train = corpus.chunks("train", max_len, overlap=True)
        self.batch_tokens, self.rate, self.seed = batch_tokens, rate, seed
        self.summary_weight = summary_weight
        self.continuation = self.tokenizer.continuation() if whole_word else None
        self.uniform, self.unigram = math.log(self.tokenizer.vocab_size), corpus.unigram_entropy()
        self.baseline = f"ln V {self.uniform:.2f}, words alone {self.unigram:.2f}"

        # Without overlap, so that every token counts once.
        self.held_out = corpus.chunks("validation", max_len, overlap=False)
        lengths = self.held_out.lengths
        order = np.arange(0, len(lengths), -(-int(lengths.sum()) // VALIDATION_TOKENS))
        order = order[np.argsort(lengths[order], kind="stable")]
        generator = torch.Generator().manual_seed(0)  # the same blanks in every run
        self.validation = [
            self._mask(self.held_out.read(indices), VALIDATION_RATE, None, generator)
            for indices in filled(order, lengths, batch_tokens)
        ]
        tokens = sum(batch.tokens for batch in self.validation)
        self.validation_tokens = tokens * (1 + EVALUATIONS / QUICK)

    def batches(self, first_step: int) -> Iterator[MaskedBatch]:
        """The training batch of each step from `first_step` on; a step always has the same one."""
        order = shuffled_batches(self.train.lengths, self.batch_tokens, self.seed, skip=first_step)
        for step, indices in enumerate(order, start=first_step):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            yield self._mask(self.train.read(indices), self.rate, self.continuation, generator)

    def _mask(
        self,
        sequences: list[Tensor],
        rate: float,
        continuation: Tensor | None,
        generator: torch.Generator,
    ) -> MaskedBatch:
        batch = PackedBatch.from_sequences(sequences)
        masked = mask_tokens(
            batch.tokens,
            generator,
            rate=rate,
            mask_id=self.tokenizer.mask_id,
            special_ids=self.tokenizer.special_ids,
            vocab_size=self.tokenizer.vocab_size,
            continuation=continuation,
        )
        batch = PackedBatch(masked.tokens, batch.cu_seqlens, batch.max_seqlen)
        return MaskedBatch(batch, masked.positions, masked.labels)

    def loss(
        self, model: BertForMaskedLM, inputs: tuple[PackedBatch, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(the losses of both tasks, that of masked-language modelling), sums in nats and float32."""
        batch, positions = inputs
        logits = model(batch, torch.cat([positions, batch.cls_positions])).float()
        masked, cls = logits.split([len(positions), len(batch.cls_positions)])
        masked_loss = F.cross_entropy(masked, labels, reduction="sum")
        tokens = batch.tokens.scatter(0, positions, labels)  # as they were before masking
        bag = bag_of_words_loss(cls, tokens, batch, self.tokenizer.special_ids)
        # A sum over all words, made about as large as that over the masked ones.
        return masked_loss + self.rate * self.summary_weight * bag, masked_loss

    def evaluation_due(self, step: int, steps: int) -> bool:
        """A few times in a run, whatever its length."""
        return step % max(1, steps // EVALUATIONS) == 0 and step < steps

    def score(self, metrics: dict) -> None:
        """The last weights are kept: the rate has come down to zero with them."""
        return None

    def validation_batches(self, quick: bool) -> list[MaskedBatch]:
        """All of them, or every 8th."""
        return self.validation[:: QUICK if quick else 1]


def bag_of_words_loss(
    logits: Tensor, tokens: Tensor, batch: PackedBatch, special_ids: Tensor
) -> Tensor:
    """Sum over the words of a batch of -log p(word), from the logits (B, V) at each sequence's [CLS].

    `tokens` (T,) are those of the batch before masking. One distribution stands for all words of a
    sequence, in whatever order, so [CLS] has to gather what the text is about: fine-tuning reads
    this vector, and masked-language modelling alone puts nothing into it. The bag of words of Le &
    Mikolov 2014 (PV-DBOW), as a second task of a BERT: Ma et al. 2024, "Drop your Decoder:
    Pre-training with Bag-of-Word Prediction".
    """
    is_word = ~torch.isin(tokens, special_ids.to(tokens.device))
    return -(logits.log_softmax(-1)[batch.sequence_ids, tokens] * is_word).sum()


EXAMPLES = 3
SENTENCE_TOKENS = range(8, 28)  # fits a line


@torch.no_grad()
def fill_examples(
    model: BertForMaskedLM,
    task: MaskedLanguageModelling,
    runtime: Runtime,
) -> list[str]:
    """Lines that show the model at work: a word hidden in held-out sentences, and its guesses."""
    tokenizer, lines = task.tokenizer, []
    rng = np.random.default_rng(0)
    model.eval()
    candidates = list(_sentences_with_words(task))
    for i in (
        np.unique(np.linspace(0, len(candidates) - 1, EXAMPLES, dtype=int)) if candidates else []
    ):
        ids, words = candidates[i]
        blank = int(rng.choice(words))
        hidden, ids[blank] = ids[blank], tokenizer.mask_id
        sequence = torch.tensor(tokenizer.frame(ids))
        batch = PackedBatch.from_sequences([sequence]).to(runtime.device)
        with runtime.autocast():
            logits = model(batch, torch.tensor([blank + 1], device=runtime.device))
        top = logits[0].float().softmax(-1).topk(4)
        guesses = ", ".join(
            f"{tokenizer.token(word)} {p:.0%}"
            for p, word in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        )
        lines.append(f"  {tokenizer.decode(ids).replace('[MASK]', '____')}")
        lines.append(f"      it was: {tokenizer.token(hidden)}; the model says: {guesses}")
    return lines


def _sentences_with_words(task: MaskedLanguageModelling) -> Iterator[tuple[list[int], list[int]]]:
    """Short held-out sentences, and where in them a whole word stands that is worth guessing."""
    token, chunks = task.tokenizer.token, task.held_out
    stop = task.tokenizer.backend.token_to_id(".")
    for chunk in chunks.read(range(0, len(chunks), -(-len(chunks) // 1000))):
        ids = chunk[1:-1].tolist()
        stops = [i for i, index in enumerate(ids) if index == stop]
        if len(stops) > 1:
            ids = ids[stops[0] + 1 : stops[1] + 1]
        if len(ids) in SENTENCE_TOKENS and len(ids) + 2 <= chunks.max_len:
            # Longer than "the", or the guess impresses nobody.
            long = [
                i for i, index in enumerate(ids) if len(token(index)) > 4 and token(index).isalpha()
            ]
            whole = [i for i in long if i + 1 == len(ids) or not token(ids[i + 1]).startswith("##")]
            if whole:
                yield ids, whole
