"""Masked-language modelling as a task for the training loop: its batches, its loss, its validation."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.batching import filled, shuffled_batches
from minitune.corpus import Corpus
from minitune.data import Dataset
from minitune.masking import mask_tokens
from minitune.model import BertForMaskedLM, PackedBatch
from minitune.processes import Processes
from minitune.tokenizer import clean
from minitune.training import Precision

VALIDATION_RATE = 0.15  # whatever the training rate is, so that runs can be compared
VALIDATION_TOKENS = 1 << 19  # of a large corpus, an evenly spread part is enough
QUICK = 8  # while training, every 8th validation batch


@dataclass
class Cloze:
    """A packed batch with blanks, and what belongs in them."""

    batch: PackedBatch
    positions: Tensor  # (M,) of the blanks, in the packed tokens
    labels: Tensor  # (M,)

    def __len__(self) -> int:
        """How many predictions the loss is a mean over."""
        return self.labels.numel()

    def split(self, parts: int) -> list["Cloze"]:
        """Contiguous shares of whole sequences, about equal in tokens; never an empty one."""
        cu, T = self.batch.cu_seqlens, self.batch.tokens.numel()
        targets = torch.arange(1, parts) * T // parts
        cuts = torch.searchsorted(cu, targets.to(cu.dtype)).tolist()
        bounds = sorted({0, *cuts, cu.numel() - 1})
        return [self._sequences(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]

    def _sequences(self, first: int, last: int) -> "Cloze":
        cu = self.batch.cu_seqlens[first : last + 1]
        start, stop = cu[0].item(), cu[-1].item()
        inside = (self.positions >= start) & (self.positions < stop)
        lengths = cu - cu[0]
        batch = PackedBatch(self.batch.tokens[start:stop], lengths, int(lengths.diff().max()))
        return Cloze(batch, self.positions[inside] - start, self.labels[inside])

    def to(self, device: torch.device) -> "Cloze":
        """The same blanks on another device."""
        return Cloze(self.batch.to(device), self.positions.to(device), self.labels.to(device))


class MaskedLanguageModelling:
    """Guess the hidden words of a corpus."""

    def __init__(
        self, corpus: Corpus, *, max_len: int, batch_tokens: int, rate: float, whole_word: bool, seed: int
    ):
        self.tokenizer = corpus.tokenizer
        self.train = corpus.pieces("train", max_len)
        self.batch_tokens, self.rate, self.seed = batch_tokens, rate, seed
        self.continuation = self.tokenizer.continuation() if whole_word else None

        pieces = corpus.pieces("validation", max_len)
        every = -(-int(pieces.lengths.sum()) // VALIDATION_TOKENS)
        order = np.arange(0, len(pieces), every)
        order = order[np.argsort(pieces.lengths[order], kind="stable")]
        generator = torch.Generator().manual_seed(0)  # the same blanks in every run
        self.validation = [
            self._mask(pieces.read(indices), VALIDATION_RATE, None, generator)
            for indices in filled(order, pieces.lengths, batch_tokens)
        ]
        self.validation_tokens = sum(cloze.batch.tokens.numel() for cloze in self.validation)

    def batches(self, first_step: int) -> Iterator[Cloze]:
        """The training batch of each step from `first_step` on; a step always has the same one."""
        order = shuffled_batches(self.train.lengths, self.batch_tokens, self.seed, skip=first_step)
        for step, indices in enumerate(order, start=first_step):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            yield self._mask(self.train.read(indices), self.rate, self.continuation, generator)

    def _mask(
        self, sequences: list[Tensor], rate: float, continuation: Tensor | None, generator: torch.Generator
    ) -> Cloze:
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
        return Cloze(batch, masked.positions, masked.labels)

    def loss(self, model: BertForMaskedLM, cloze: Cloze) -> Tensor:
        """Sum over the blanks of -log p(label), in nats and float32."""
        logits = model(cloze.batch, cloze.positions)
        return F.cross_entropy(logits.float(), cloze.labels, reduction="sum")

    @torch.no_grad()
    def evaluate(self, model: BertForMaskedLM, processes: Processes, quick: bool = False) -> dict:
        """Mean loss and accuracy at the blanks of the validation rows, over all processes."""
        totals = torch.zeros(3, dtype=torch.float64)  # loss, right guesses, guesses
        batches = self.validation[:: QUICK if quick else 1]
        for cloze in batches[processes.rank :: processes.count]:
            cloze = cloze.to(processes.device)
            logits = model(cloze.batch, cloze.positions).float()
            loss = F.cross_entropy(logits, cloze.labels, reduction="sum")
            right = (logits.argmax(-1) == cloze.labels).sum()
            totals += torch.tensor([loss.item(), right.item(), len(cloze)], dtype=torch.float64)
        loss, right, guesses = processes.sum(totals).tolist()
        return {"loss": loss / max(guesses, 1), "masked_accuracy": right / max(guesses, 1)}


EXAMPLES = 3
EXAMPLE_TOKENS = range(12, 28)  # a sentence that fits a line


@torch.no_grad()
def fill_examples(
    model: BertForMaskedLM, corpus: Corpus, dataset: Dataset, precision: Precision, device: torch.device
) -> list[str]:
    """Lines that show the model at work: a word hidden in held-out sentences, and its guesses."""
    tokenizer, lines = corpus.tokenizer, []
    rng = np.random.default_rng(0)
    model.eval()
    for row in dataset.rows("validation"):
        first_sentence = clean(row.text).partition(". ")[0] + "."
        [ids] = tokenizer.encode([first_sentence])
        # Hide a whole word of some length: guessing "the" impresses nobody.
        words = [
            i for i, (a, b) in enumerate(zip(ids, ids[1:], strict=False))
            if len(tokenizer.token(a)) > 4 and tokenizer.token(a).isalpha()
            and not tokenizer.token(b).startswith("##")
        ]  # fmt: skip
        if len(ids) not in EXAMPLE_TOKENS or not words or rng.random() < 0.9:
            continue
        blank = int(rng.choice(words))
        hidden, ids[blank] = ids[blank], tokenizer.mask_id
        sequence = torch.tensor([tokenizer.cls_id, *ids, tokenizer.sep_id])
        batch = PackedBatch.from_sequences([sequence]).to(device)
        with precision.autocast(device):
            logits = model(batch, torch.tensor([blank + 1], device=device))
        top = logits[0].float().softmax(-1).topk(4)
        guesses = ", ".join(
            f"{tokenizer.token(i)} {p:.0%}"
            for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        )
        text = tokenizer.decode(ids).replace("[MASK]", "____")
        lines += [f"  {text}", f"      it was: {tokenizer.token(hidden)}; the model says: {guesses}"]
        if len(lines) == 2 * EXAMPLES:
            break
    return lines
