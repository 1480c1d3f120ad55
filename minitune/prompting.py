"""Prompting: a masked language model answers in words. No weight changes.

A cloze is a sentence with a blank: "The plot grips. It was ____." Pretraining taught the model to
fill blanks, so a task that is written as a cloze needs no training. It takes three parts:

    template     "{text} It was [MASK]." makes a cloze of a text
    fill-mask    the model gives every word of its vocabulary a probability at the [MASK]
    verbalizer   says which words stand for which label: "good" and "great" for positive

and the label whose words are most probable is the answer (Schick & Schütze 2021, "Exploiting Cloze
Questions for Few Shot Text Classification"; Gao et al. 2021, "Making Pre-trained Language Models
Better Few-shot Learners"). These probabilities lean to one label: calibration.py levels them.

Shapes: N texts, P blanks of a query, W words of all labels, L labels, V = vocab_size.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
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


Words = list[tuple[str, float]]  # with their probabilities, the most probable first


@dataclass
class ClozeQuery:
    """A sequence of token ids, from [CLS] to [SEP], and the positions to guess, ascending."""

    ids: list[int]
    positions: list[int]


@dataclass
class FillMask:
    """A masked language model that fills blanks."""

    model: BertForMaskedLM
    tokenizer: Tokenizer
    runtime: Runtime
    batch_tokens: int | None = None  # None: what suits the device

    @torch.no_grad()
    def log_probabilities(self, queries: Sequence[ClozeQuery]) -> Iterator[tuple[int, Tensor]]:
        """The index of each query and its float32 log-probabilities (P, V), shortest queries first.

        Raises UserError where these are no numbers, or a query has more tokens than positions.
        """
        device, lengths = self.runtime.device, np.array([len(query.ids) for query in queries])
        longest, most = lengths.max(initial=0), self.model.config.max_position_embeddings
        if longest > most:
            raise UserError(f"{longest} tokens are too many, the model has {most} positions")
        for indices in sorted_batches(lengths, self.batch_tokens or reading_tokens(device)):
            chosen = [queries[i] for i in indices]
            batch = PackedBatch.from_sequences([torch.tensor(query.ids) for query in chosen])
            pairs = zip(chosen, batch.cls_positions.tolist(), strict=True)
            positions = [start + i for query, start in pairs for i in query.positions]
            with self.runtime.autocast():
                hidden = self.model.bert(batch.to(device), torch.tensor(positions, device=device))
            # The head in float32: in bfloat16 its log-probabilities come in steps of 1/16.
            logits = self.model.head(hidden.float(), self.model.bert.embeddings.word.weight)
            # Some embeddings have more rows than there are words; those cannot be an answer.
            logs = logits.log_softmax(-1)[:, : self.tokenizer.vocab_size].cpu()
            if logs.isnan().any():
                raise UserError("the model's answers are no numbers: its weights must be damaged")
            sizes = [len(query.positions) for query in chosen]
            yield from zip(indices.tolist(), logs.split(sizes), strict=True)

    def words(self, queries: Sequence[ClozeQuery], count: int) -> list[list[Words]]:
        """The `count` most probable words for each query and each position to guess in it."""
        answers: list[list[Words]] = [[]] * len(queries)
        for i, logs in self.log_probabilities(queries):
            top = logs.exp().topk(min(count, logs.size(1)))
            for p, tokens in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                words = map(self.tokenizer.token, tokens)
                answers[i] = [*answers[i], list(zip(words, p, strict=True))]
        return answers


class Template:
    """A sentence around one {text} and one [MASK]."""

    def __init__(self, sentence: str, tokenizer: Tokenizer):
        """Raises UserError where either is missing, or there twice."""
        for part in (TEXT, MASK):
            if sentence.count(part) != 1:
                raise UserError(f"the template {sentence!r} must hold {part} once")
        parts = re.split(r"(\{text\}|\[MASK\])", sentence)
        pairs = zip(parts, tokenizer.encode(parts), strict=True)
        self.parts = [part if part in (TEXT, MASK) else ids for part, ids in pairs]
        self.length = sum(len(part) for part in self.parts if isinstance(part, list))

    def fill(self, text: list[int], blank: Sequence[int]) -> tuple[list[int], int]:
        """The sentence as ids, with these ids for {text} and [MASK], and where the blank begins."""
        ids, start = [], 0
        for part in self.parts:
            start = len(ids) if part == MASK else start
            ids += {TEXT: text, MASK: blank}[part] if isinstance(part, str) else part
        return ids, start


class Verbalizer:
    """The words that stand for each label, of one token or several."""

    def __init__(self, words: dict[str, list[str]], tokenizer: Tokenizer):
        """`words` of each label name. Raises UserError for fewer than two labels, a label without
        words, a word that the tokenizer does not know, or one that stands for two labels."""
        self.names = dict(enumerate(words))
        if len(words) < 2 or not all(words.values()):
            words = "two labels or more with a word each: negative=bad positive=good"
            raise UserError(f"--words takes {words}")
        pairs = [(label, word) for label, name in self.names.items() for word in words[name]]
        self.labels = [label for label, _ in pairs]  # (W,)
        self.ids = tokenizer.encode([word for _, word in pairs])  # (W,), each a list of tokens
        of_label = F.one_hot(torch.tensor(self.labels)).float()
        self.mean = of_label / of_label.sum(0)  # (W, L), from scores of words to those of labels
        label_of: dict[tuple[int, ...], int] = {}
        for (label, word), ids in zip(pairs, self.ids, strict=True):
            if not ids or tokenizer.unk_id in ids:
                name = self.names[label]
                raise UserError(f"--words: the tokenizer does not know {word!r}, of {name}")
            if label_of.setdefault(tuple(ids), label) != label:
                raise UserError(f"--words: {word!r} stands for two labels")
        # A token of a word is guessed from the tokens before it; it and those after it are masked.
        # All words of one token share one blank, so that one query is enough for them.
        self.blanks = defaultdict(list)  # blank -> [(word, the token to guess, the word's length)]
        for word, ids in enumerate(self.ids):
            for i, token in enumerate(ids):
                blank = (*ids[:i], *[tokenizer.mask_id] * (len(ids) - i))
                self.blanks[blank].append((word, token, len(ids)))


class Prompt:
    """A template and a verbalizer, put to a model."""

    def __init__(
        self, sentence: str, words: dict[str, list[str]], fill_mask: FillMask, max_len: int
    ):
        """`max_len` tokens in a query without demonstrations; UserError if a text has no room."""
        self.sentence, self.fill_mask, self.max_len = sentence, fill_mask, max_len
        self.template = Template(sentence, fill_mask.tokenizer)
        self.verbalizer = Verbalizer(words, fill_mask.tokenizer)
        # How many tokens of a text fit beside [CLS], [SEP], the template and the longest word.
        self.room = max_len - 2 - self.template.length - max(map(len, self.verbalizer.ids))
        if self.room < 1:
            words = f"the template {sentence!r} leaves no room for a text"
            raise UserError(f"{words} in {max_len} tokens")
        self.demonstrations: list[int] = []

    def demonstrate(self, texts: list[list[int]], labels: list[int]) -> None:
        """Put answered examples in front of every query (few-shot: Brown et al. 2020).

        They share the positions that `max_len` leaves free, and lose their beginnings for it.
        Raises UserError where too few are left.
        """
        verbalizer, positions = self.verbalizer, self.fill_mask.model.config.max_position_embeddings
        answers = [verbalizer.ids[verbalizer.labels.index(label)] for label in labels]
        share = (positions - self.max_len) // max(len(texts), 1)
        room = share - 2 - self.template.length - max(map(len, answers), default=0)
        if texts and room < 8:
            shots = f"--shots {len(texts)}: no room beside --max-len {self.max_len}"
            raise UserError(f"{shots}, the model has {positions} positions")
        self.demonstrations = []
        for text, answer in zip(texts, answers, strict=True):
            self.demonstrations += self.template.fill(text[-room:], answer)[0]

    def query(self, text: list[int], blank: Sequence[int]) -> ClozeQuery:
        """The cloze of a text, with these tokens for [MASK]; the first mask in them is guessed.

        A long text loses its beginning: most reviewers end with a verdict.
        """
        tokenizer = self.fill_mask.tokenizer
        ids, start = self.template.fill(text[-self.room :], blank)
        position = 1 + len(self.demonstrations) + start + blank.index(tokenizer.mask_id)
        return ClozeQuery(tokenizer.frame([*self.demonstrations, *ids]), [position])

    def scores(self, texts: Sequence[list[int]]) -> Tensor:
        """(N, L): how well the words of each label fit, in log-probability a token.

        A word of several tokens is guessed one token at a time, from left to right, with as many
        masks as it has tokens left: the pseudo-log-likelihood of Salazar et al. 2020, corrected by
        Kauf & Ivanova 2023 (the later tokens of a rare word would give the earlier ones away). A
        word gets the mean over its tokens, and a label the mean over its words.
        """
        scores = torch.zeros(len(texts), len(self.verbalizer.ids))
        for blank, guesses in self.verbalizer.blanks.items():
            queries = [self.query(text, blank) for text in texts]
            for i, logs in self.fill_mask.log_probabilities(queries):
                for word, token, length in guesses:
                    scores[i, word] += logs[0, token] / length
        return scores @ self.verbalizer.mean

    def most_probable_words(self, texts: Sequence[list[int]], count: int) -> list[Words]:
        """The `count` most probable words, of all there are, in the blank of each text."""
        queries = [self.query(text, [self.fill_mask.tokenizer.mask_id]) for text in texts]
        return [words for [words] in self.fill_mask.words(queries, count)]


def fill_blanks(fill_mask: FillMask, sentence: str, count: int) -> list[Words]:
    """For each [MASK] the `count` most probable words, each by itself; UserError where none is."""
    tokenizer = fill_mask.tokenizer
    if MASK not in sentence:
        raise UserError(f"--fill: the sentence has no {MASK}")
    ids = []
    for part in tokenizer.encode(sentence.split(MASK)):
        ids += [*part, tokenizer.mask_id]
    ids = tokenizer.frame(ids[:-1])
    positions = [i for i, token in enumerate(ids) if token == tokenizer.mask_id]
    return fill_mask.words([ClozeQuery(ids, positions)], count)[0]


def in_words(words: Words) -> str:
    """Words and their probabilities for people."""
    return ", ".join(f"{word} {probability:.1%}" for word, probability in words)


ROUNDS = 10  # as in the paper; more rounds: closer to one token at a time; fewer: less coherent


def generate(fill_mask: FillMask, prompt: str, count: int, temperature: float, seed: int) -> str:
    """The prompt with `count` tokens after it, by mask-predict (Ghazvininejad et al. 2019).

    First all new tokens are masks and guessed at once, each by itself, so that they fit together
    badly. In every round after it the least certain of them are masked again, fewer each time, and
    guessed beside those that stay.

    The argmax of log p + temperature · Gumbel noise is a draw from softmax(log p / temperature)
    (Maddison et al. 2014, "A* Sampling"); at 0 it is the most probable token.
    """
    tokenizer = fill_mask.tokenizer
    start = tokenizer.encode([prompt])[0]
    ids = torch.tensor(tokenizer.frame([*start, *[tokenizer.mask_id] * count]))
    certainty = torch.zeros(count)  # log-probability of each new token when it was written
    generator = torch.Generator().manual_seed(seed)
    rounds = min(ROUNDS, count)
    for done in range(rounds):
        masked = certainty.argsort()[: count - count * done // rounds].sort().values
        positions = 1 + len(start) + masked
        ids[positions] = tokenizer.mask_id
        ((_, logs),) = fill_mask.log_probabilities([ClozeQuery(ids.tolist(), positions.tolist())])
        logs[:, tokenizer.special_ids] = -torch.inf  # neither a new mask nor the end of the text
        noise = -torch.empty_like(logs).exponential_(generator=generator).log()  # Gumbel's
        tokens = (logs + temperature * noise).argmax(-1)
        ids[positions] = tokens
        certainty[masked] = logs.gather(1, tokens[:, None]).squeeze(1)
    written, given = tokenizer.decode(ids[1:-1].tolist()), tokenizer.decode(start)
    return prompt + written[len(given) :]
