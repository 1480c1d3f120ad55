"""Prompting: a masked language model classifies texts by filling a blank. No weight changes.

A cloze is a sentence with a blank: "The plot grips. It was ____." Pretraining taught the model to
fill blanks, so a task that is written as a cloze needs no training. It takes three parts:

    template     "{text} It was [MASK]." turns a text into a cloze
    fill-mask    the model gives every word of its vocabulary a probability at the [MASK]
    verbalizer   says which words stand for which label: "good" and "great" for positive

The answer is the label whose words are most probable (Schick & Schütze 2021, "Exploiting Cloze
Questions for Few Shot Text Classification"; Gao et al. 2021, "Making Pre-trained Language Models
Better Few-shot Learners"). Most prompts favour one label: calibration.py corrects that.

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
from minitune.data import label_index
from minitune.model import BertForMaskedLM
from minitune.support.errors import UserError
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer

TEXT, MASK = "{text}", "[MASK]"
LEAST_DEMONSTRATION = 8  # tokens of a text
ROUNDS = 10  # of `generate`, as in its paper; with fewer of them tokens fit together less well
# Templates and words were chosen on validation rows: tests/benchmarks/LOG.md has the others.
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
Words = list[tuple[str, float]]  # words and their probabilities, the most probable first


@dataclass
class ClozeQuery:
    """A sequence with masks, and where the model has to say which token stands there."""

    ids: list[int]  # from [CLS] to [SEP]
    positions: list[int]  # ascending


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

        Raises UserError where these are NaN, or a query is longer than what the model can read.
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
            # The head in float32: bfloat16 would round its log-probabilities to steps of 1/16.
            logits = self.model.head(hidden.float(), self.model.bert.embeddings.word.weight)
            # A model may have more embeddings than its tokenizer has words.
            logs = logits.log_softmax(-1)[:, : self.tokenizer.vocab_size].cpu()
            if logs.isnan().any():
                raise UserError("the model's answers are no numbers: its weights must be damaged")
            sizes = [len(query.positions) for query in chosen]
            yield from zip(indices.tolist(), logs.split(sizes), strict=True)

    def words(self, queries: Sequence[ClozeQuery], count: int) -> list[list[Words]]:
        """The `count` most probable words for each query and each position to guess in it."""
        answers: list[list[Words]] = [[] for _ in queries]
        for i, logs in self.log_probabilities(queries):
            top = logs.exp().topk(min(count, logs.size(1)))
            for p, tokens in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                answers[i].append(list(zip(map(self.tokenizer.token, tokens), p, strict=True)))
        return answers


class Template:
    """A sentence around one {text} and one [MASK]."""

    def __init__(self, sentence: str, tokenizer: Tokenizer):
        """Raises UserError where either is missing, or there twice."""
        for part in (TEXT, MASK):
            if sentence.count(part) != 1:
                raise UserError(f"the template {sentence!r} must hold {part} once")
        self.sentence = sentence
        parts = tokenizer.encode(re.split(r"\{text\}|\[MASK\]", sentence))
        self.before, self.between, self.after = parts
        self.text_first = sentence.index(TEXT) < sentence.index(MASK)
        self.length = sum(map(len, parts))  # tokens, without the text and the blank

    def fill(self, text: list[int], blank: Sequence[int]) -> tuple[list[int], int]:
        """The sentence as ids, with these ids for {text} and [MASK], and where the blank begins."""
        if self.text_first:
            start = len(self.before) + len(text) + len(self.between)
            return [*self.before, *text, *self.between, *blank, *self.after], start
        return [*self.before, *blank, *self.between, *text, *self.after], len(self.before)

    def room(self, max_len: int, blank: int) -> int:
        """How many tokens of a text fit beside [CLS], [SEP], the template and a blank.

        `blank` is its number of tokens, `max_len` that of the query. UserError if none fits.
        """
        if (room := max_len - 2 - self.length - blank) < 1:
            problem = f"the template {self.sentence!r} leaves no room for a text"
            raise UserError(f"{problem} in {max_len} tokens")
        return room


def read_words(arguments: list[str]) -> dict[str, list[str]]:
    """`negative=bad,dull` and so on as {label: words}."""
    words: dict[str, list[str]] = {}
    for argument in arguments:
        label, _, listed = argument.partition("=")
        several = [word.strip() for word in listed.split(",") if word.strip()]
        if not (label.strip() and several):
            raise UserError(f"--words {argument}: should be LABEL=WORD or LABEL=WORD,WORD")
        words.setdefault(label.strip(), []).extend(several)
    return words


def match_labels(names: dict[int, str], of_words: dict[int, str], source: str) -> list[int]:
    """For each label of `source`, by its name, the index of that label among `of_words`.

    Names that are numbers count the labels of `of_words`. Raises UserError where one is missing.
    """
    matches = [label_index(name, of_words, numbers_too=True) for name in names.values()]
    if None in matches:
        known = f"none of --words: {', '.join(of_words.values())}"
        raise UserError(f"{source}: the label {names[matches.index(None)]} is {known}")
    return matches


class Verbalizer:
    """The words that stand for each label, of one token or several."""

    def __init__(self, words: dict[str, list[str]], tokenizer: Tokenizer):
        """`words` of each label, by its name.

        Raises UserError for fewer than two labels, a label without words, a word that the tokenizer
        does not know, or one that stands for two labels.
        """
        self.names = dict(enumerate(words))
        if len(words) < 2 or not all(words.values()):
            example = "negative=bad positive=good"
            raise UserError(f"--words takes two labels or more with a word each: {example}")
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
        # To guess token i of a word, the blank holds the tokens before it, and masks from i on.
        # All words of one token share one blank, so one query is enough for them.
        self.blanks = defaultdict(list)  # blank -> [(index of the word, token, the word's length)]
        for word, ids in enumerate(self.ids):
            for i, token in enumerate(ids):
                blank = (*ids[:i], *[tokenizer.mask_id] * (len(ids) - i))
                self.blanks[blank].append((word, token, len(ids)))


class Prompt:
    """A template and a verbalizer, put to a model."""

    def __init__(
        self, sentence: str, words: dict[str, list[str]], fill_mask: FillMask, max_len: int
    ):
        """`max_len`: tokens of a query without demonstrations. UserError if a text has no room."""
        self.sentence, self.fill_mask, self.max_len = sentence, fill_mask, max_len
        self.template = Template(sentence, fill_mask.tokenizer)
        self.verbalizer = Verbalizer(words, fill_mask.tokenizer)
        self.room = self.template.room(max_len, max(map(len, self.verbalizer.ids)))
        self.demonstrations: list[int] = []

    def demonstrate(self, texts: list[list[int]], labels: list[int]) -> None:
        """Put clozes with their answers in front of every query (few-shot: Brown et al. 2020).

        They share the positions that `max_len` leaves free; of a longer text the end is kept.
        Raises UserError where there is not room for a few tokens of each.
        """
        verbalizer, positions = self.verbalizer, self.fill_mask.model.config.max_position_embeddings
        answers = [verbalizer.ids[verbalizer.labels.index(label)] for label in labels]
        share = (positions - self.max_len) // max(len(texts), 1)
        room = share - 2 - self.template.length - max(map(len, answers), default=0)
        if texts and room < LEAST_DEMONSTRATION:
            shots = f"--shots {len(texts)}: no room beside --max-len {self.max_len}"
            raise UserError(f"{shots}, the model has {positions} positions")
        self.demonstrations = []
        for text, answer in zip(texts, answers, strict=True):
            self.demonstrations += self.template.fill(text[-room:], answer)[0]

    def query(self, text: list[int], blank: Sequence[int]) -> ClozeQuery:
        """The cloze of a text, with these tokens for [MASK]; the first mask in them is guessed.

        Of a long text the end is kept: most reviewers end with a verdict.
        """
        tokenizer = self.fill_mask.tokenizer
        ids, start = self.template.fill(text[-self.room :], blank)
        position = 1 + len(self.demonstrations) + start + blank.index(tokenizer.mask_id)
        return ClozeQuery(tokenizer.frame([*self.demonstrations, *ids]), [position])

    def scores(self, texts: Sequence[list[int]]) -> Tensor:
        """(N, L): how well the words of each label fit, in log-probability a token.

        A word of several tokens is guessed one token at a time, from left to right, while the
        tokens after it are masked too: the pseudo-log-likelihood of Salazar et al. 2020, as Kauf &
        Ivanova 2023 correct it (the later tokens of a rare word would betray the earlier ones). The
        score of a word is the mean over its tokens, that of a label the mean over its words.
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


def with_blanks(sentence: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a sentence from [CLS] to [SEP], in which [MASK] is a mask and no text."""
    ids = []
    for part in tokenizer.encode(sentence.split(MASK)):
        ids += [*part, tokenizer.mask_id]
    return tokenizer.frame(ids[:-1])


def fill_blanks(fill_mask: FillMask, sentence: str, count: int) -> list[Words]:
    """The `count` most probable words for each [MASK]; UserError where there is no [MASK].

    All blanks are guessed at once, so a guess knows nothing of the words in the other blanks.
    """
    tokenizer = fill_mask.tokenizer
    if MASK not in sentence:
        raise UserError(f"--fill: the sentence has no {MASK}")
    ids = with_blanks(sentence, tokenizer)
    positions = [i for i, token in enumerate(ids) if token == tokenizer.mask_id]
    return fill_mask.words([ClozeQuery(ids, positions)], count)[0]


def in_words(words: Words) -> str:
    """Words and their probabilities as text: "good 51.2%, great 20.0%"."""
    return ", ".join(f"{word} {probability:.1%}" for word, probability in words)


def generate(fill_mask: FillMask, prompt: str, count: int, temperature: float, seed: int) -> str:
    """The prompt with `count` tokens after it, by mask-predict (Ghazvininejad et al. 2019).

    In the first round all new tokens are masks and are guessed at once, so they hardly fit
    together. In each later round the least certain of them are masked and guessed again, with the
    others as context; every round masks fewer.

    The argmax of log p + temperature · Gumbel noise is a draw from softmax(log p / temperature)
    (Maddison et al. 2014, "A* Sampling"); at temperature 0 it is the most probable token.
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
        noise = -torch.empty_like(logs).exponential_(generator=generator).log()  # Gumbel noise
        tokens = (logs + temperature * noise).argmax(-1)
        ids[positions] = tokens
        certainty[masked] = logs.gather(1, tokens[:, None]).squeeze(1)
    written, given = tokenizer.decode(ids[1:-1].tolist()), tokenizer.decode(start)
    return prompt + written[len(given) :]
