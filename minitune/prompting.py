"""Prompting: a masked language model answers by what it would write into a blank. No weight changes.

A review becomes a cloze, "{text} It was [MASK].", and the answer is read from the probabilities of
a few label words at the mask (Schick & Schütze 2021, "Exploiting Cloze Questions for Few Shot Text
Classification"; Gao et al. 2021, "Making Pre-trained Language Models Better Few-shot Learners").
What those probabilities are worth is another question: see calibration.py.

Shapes: N texts, L labels, V = vocab_size.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minitune.batching import PackedBatch, reading_tokens, sorted_batches
from minitune.model import BertForMaskedLM
from minitune.support.errors import UserError
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer

TEXT, MASK = "{text}", "[MASK]"
# Chosen on validation rows, as the words below; tests/benchmarks/LOG.md has what others gave.
TEMPLATES = (
    "{text} It was [MASK].",
    "{text} All in all, it was [MASK].",
    "{text} This is a [MASK] movie.",
    "{text} The film was [MASK].",
    "{text} Just [MASK]!",
    "{text} I thought it was [MASK].",
    "A [MASK] movie. {text}",
    "The movie was [MASK]. {text}",
)
WORDS = {
    "negative": ["bad", "terrible", "awful", "boring", "dull", "lame"],
    "positive": ["good", "great", "wonderful", "excellent", "fun", "brilliant"],
}


@dataclass
class ClozeQuery:
    """A sequence with blanks: token ids with [CLS] and [SEP], and which of them are asked for."""

    ids: list[int]
    blanks: list[int]


@dataclass
class FillMask:
    """A masked language model, and how it is run. All that happens to it here is being read."""

    model: BertForMaskedLM
    tokenizer: Tokenizer
    runtime: Runtime
    batch_tokens: int | None = None  # None: what suits the device

    @torch.no_grad()
    def log_probabilities(self, queries: Sequence[ClozeQuery]) -> Iterator[tuple[int, Tensor]]:
        """(index, float32 log-probabilities (blanks, V)) of each query, shortest queries first.

        The head runs at the blanks only. All of V, since the words compete with every other word:
        next to an encoder that read a review, one product with the vocabulary costs a few percent
        at most.
        """
        lengths = np.array([len(query.ids) for query in queries])
        batch_tokens = self.batch_tokens or reading_tokens(self.runtime.device)
        for indices in sorted_batches(lengths, batch_tokens):
            chosen = [queries[i] for i in indices]
            batch = PackedBatch.from_sequences([torch.tensor(query.ids) for query in chosen])
            starts = batch.cu_seqlens.tolist()
            blanks = [
                start + i
                for query, start in zip(chosen, starts, strict=False)
                for i in query.blanks
            ]
            with self.runtime.autocast():
                hidden = self.model.bert(
                    batch.to(self.runtime.device), torch.tensor(blanks, device=self.runtime.device)
                )
            # The head in float32: in bfloat16 its log-probabilities come in steps of 1/16.
            logits = self.model.head(hidden.float(), self.model.bert.embeddings.word.weight)
            counts = [len(query.blanks) for query in chosen]
            # Some models have more rows of embeddings than words: nobody can write those.
            logs = logits.log_softmax(-1)[:, : self.tokenizer.vocab_size]
            yield from zip(indices.tolist(), logs.cpu().split(counts), strict=True)


class Template:
    """A sentence around one {text} and one [MASK]."""

    def __init__(self, sentence: str, tokenizer: Tokenizer):
        """Raises UserError where either is missing, or there twice."""
        self.sentence = sentence
        for part in (TEXT, MASK):
            if sentence.count(part) != 1:
                raise UserError(f"the template {sentence!r} must hold {part} once")
        parts = re.split(r"(\{text\}|\[MASK\])", sentence)
        ids = tokenizer.encode(parts)
        self.parts = [
            part if part in (TEXT, MASK) else own for part, own in zip(parts, ids, strict=True)
        ]
        self.length = 2 + sum(len(part) for part in self.parts if isinstance(part, list))

    def room(self, max_len: int, blank: int) -> int:
        """How many tokens of text go with a blank of so many into a sequence; UserError for none."""
        room = max_len - self.length - blank
        if room < 1:
            raise UserError(
                f"the template {self.sentence!r} leaves no room for a text in {max_len} tokens"
            )
        return room

    def body(self, text: list[int], blank: list[int]) -> tuple[list[int], int]:
        """The sentence with both filled in, as ids, and where the blank begins."""
        ids, start = [], 0
        for part in self.parts:
            start = len(ids) if part == MASK else start
            ids += {TEXT: text, MASK: blank}[part] if isinstance(part, str) else part
        return ids, start


class Verbalizer:
    """The words that stand for each label, of one token or several."""

    def __init__(self, words: dict[str, list[str]], tokenizer: Tokenizer):
        """Raises UserError for fewer than two labels, a label without words, or a word nobody knows."""
        self.names = dict(enumerate(words))
        if len(words) < 2 or not all(words.values()):
            raise UserError(
                "--words takes two labels or more with a word each: negative=bad positive=good"
            )
        words = [(label, word) for label, name in self.names.items() for word in words[name]]
        self.labels = torch.tensor([label for label, _ in words])  # of each word
        self.ids = tokenizer.encode([word for _, word in words])
        owner: dict[tuple[int, ...], int] = {}  # the label of each word
        for (label, word), ids in zip(words, self.ids, strict=True):
            if not ids or tokenizer.unk_id in ids:
                raise UserError(
                    f"--words: the tokenizer does not know {word!r}, of {self.names[label]}"
                )
            if owner.setdefault(tuple(ids), label) != label:
                raise UserError(f"--words: {word!r} stands for two labels")
        self.longest = max(map(len, self.ids))
        # What has to be in the blank for a token of a word to be asked for: the word's tokens
        # before it, and masks for it and those after it. Words of one token all share one blank.
        self.queries = defaultdict(list)  # blank -> [(word, its token, the word's length)]
        for word, ids in enumerate(self.ids):
            for i, token in enumerate(ids):
                blank = (*ids[:i], *[tokenizer.mask_id] * (len(ids) - i))
                self.queries[blank].append((word, token, len(ids)))

    def by_label(self, scores: Tensor) -> Tensor:
        """(N, words) log-probabilities to (N, L): the mean over the words of each label."""
        sums = scores.new_zeros(len(scores), len(self.names)).index_add(1, self.labels, scores)
        return sums / torch.bincount(self.labels)


class Prompt:
    """A template with label words, put to a model."""

    def __init__(
        self, sentence: str, words: dict[str, list[str]], fill_mask: FillMask, max_len: int
    ):
        """`max_len` tokens in a sequence, demonstrations apart."""
        self.sentence, self.fill_mask, self.max_len = sentence, fill_mask, max_len
        self.template = Template(sentence, fill_mask.tokenizer)
        self.words = Verbalizer(words, fill_mask.tokenizer)
        self.room = self.template.room(max_len, self.words.longest)
        self.demonstrations: list[int] = []

    def demonstrate(self, texts: list[list[int]], labels: list[int]) -> None:
        """Put answered examples in front of every question (Brown et al. 2020, few-shot), as room allows.

        They share the positions that `max_len` leaves free. Raises UserError where these are too
        few.
        """
        free = self.fill_mask.model.config.max_position_embeddings - self.max_len
        answers = [self.words.ids[self.words.labels.tolist().index(label)] for label in labels]
        each = free // max(len(texts), 1) - self.template.length - max(map(len, answers), default=0)
        if texts and each < 8:
            raise UserError(
                f"--shots {len(texts)}: no room beside --max-len {self.max_len}, "
                f"the model has {free + self.max_len} positions"
            )
        self.demonstrations = [
            token
            for text, answer in zip(texts, answers, strict=True)
            for token in self.template.body(text[-each:], answer)[0]
        ]

    def query(self, text: list[int], blank: Sequence[int]) -> ClozeQuery:
        """The question about a text.

        A long text loses its beginning: template and mask survive, and most reviewers end with a
        verdict.
        """
        tokenizer = self.fill_mask.tokenizer
        body, start = self.template.body(text[-self.room :], list(blank))
        first = blank.index(tokenizer.mask_id) + start + 1 + len(self.demonstrations)
        return ClozeQuery(tokenizer.frame([*self.demonstrations, *body]), [first])

    def scores(self, texts: Sequence[list[int]]) -> Tensor:
        """(N, L): how well each label's words fit each text, in log-probability a token.

        A word of several tokens is asked for one token at a time, from left to right, the ones
        after it hidden, in as many blanks as it has tokens (Salazar et al. 2020's
        pseudo-log-likelihood with the correction of Kauf & Ivanova 2023: seen pieces of a rare word
        would give the others away). The mean over its tokens stands for the word, and the mean over
        its words for the label.
        """
        scores = torch.zeros(len(texts), len(self.words.ids))
        for blank, queries in self.words.queries.items():
            for i, logs in self.fill_mask.log_probabilities(
                [self.query(text, blank) for text in texts]
            ):
                for word, token, length in queries:
                    scores[i, word] += logs[0, token] / length
        return self.words.by_label(scores)

    def most_probable_words(
        self, texts: Sequence[list[int]], count: int = 5
    ) -> list[list[tuple[str, float]]]:
        """The most probable words, of all, in the blank of each text, with their probabilities."""
        answers: list = [None] * len(texts)
        queries = [self.query(text, (self.fill_mask.tokenizer.mask_id,)) for text in texts]
        for i, logs in self.fill_mask.log_probabilities(queries):
            answers[i] = most_probable(logs[0], count, self.fill_mask.tokenizer)
        return answers


def most_probable(logs: Tensor, count: int, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """The words with the largest of these log-probabilities (V,), and their probabilities."""
    top = logs.exp().topk(min(count, tokenizer.vocab_size))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [(tokenizer.token(index), probability) for index, probability in pairs]


def in_words(pairs: list[tuple[str, float]]) -> str:
    """Words and their probabilities for people."""
    return ", ".join(f"{word} {probability:.1%}" for word, probability in pairs)


ROUNDS = 10  # as in the paper; more words come one at a time, fewer badly together


def fill_blanks(fill_mask: FillMask, sentence: str, count: int) -> list[list[tuple[str, float]]]:
    """For each [MASK] of the sentence the `count` most probable words, each blank by itself.

    Raises UserError where there is no [MASK], or the sentence is longer than the model's positions.
    """
    if MASK not in sentence:
        raise UserError(f"--fill: the sentence has no {MASK}")
    tokenizer, ids = fill_mask.tokenizer, []
    for part in tokenizer.encode(sentence.split(MASK)):
        ids += [*part, tokenizer.mask_id]
    ids = _framed(fill_mask, ids[:-1], "--fill")
    blanks = [i for i, token in enumerate(ids) if token == tokenizer.mask_id]
    ((_, logs),) = fill_mask.log_probabilities([ClozeQuery(ids, blanks)])
    return [most_probable(blank, count, tokenizer) for blank in logs]


def generate(fill_mask: FillMask, prompt: str, count: int, temperature: float, seed: int) -> str:
    """The prompt with `count` tokens after it, by iterative unmasking.

    Mask-predict (Ghazvininejad et al. 2019): all blanks are filled at once, each by itself, which
    reads badly together; then the words that the model is least sure of are hidden again and
    guessed anew beside those that stay, fewer in every round. Words are drawn at this
    `temperature`; 0 takes the most probable.

    Raises UserError where the tokens are more than the model's positions.
    """
    tokenizer = fill_mask.tokenizer
    start = tokenizer.encode([prompt])[0]
    ids = torch.tensor(_framed(fill_mask, [*start, *[tokenizer.mask_id] * count], "--generate"))
    blanks = torch.arange(count) + len(start) + 1
    sureness = torch.zeros(count)  # log-probability of each word when it was written
    generator = torch.Generator().manual_seed(seed)
    rounds = min(ROUNDS, count)
    for done in range(rounds):
        hidden = sureness.argsort()[
            : count - count * done // rounds
        ]  # all of them in the first round
        ids[blanks[hidden]] = tokenizer.mask_id
        ((_, logs),) = fill_mask.log_probabilities(
            [ClozeQuery(ids.tolist(), blanks[hidden].tolist())]
        )
        logs[:, tokenizer.special_ids] = -torch.inf  # neither a new blank nor the end of the text
        if temperature:
            odds = (logs.double() - logs.amax(-1, keepdim=True)) / temperature
            words = torch.multinomial(odds.softmax(-1), 1, generator=generator).squeeze(1)
        else:
            words = logs.argmax(-1)
        ids[blanks[hidden]] = words
        sureness[hidden] = logs.gather(1, words[:, None]).squeeze(1)
    written, given = tokenizer.decode(ids[1:-1].tolist()), tokenizer.decode(start)
    return prompt + written[len(given) :]


def _framed(fill_mask: FillMask, ids: list[int], option: str) -> list[int]:
    """With [CLS] and [SEP]."""
    longest = fill_mask.model.config.max_position_embeddings - 2
    if len(ids) > longest:
        raise UserError(f"{option}: {len(ids)} tokens, the model has room for {longest}")
    return fill_mask.tokenizer.frame(ids)
