"""Why this label? What each word of a text adds to the answer, and a test of such claims.

The question is about f, the logit of the predicted label minus that of the best other label. Three
answers give each word a number:

    integrated_gradients   how f grows while all words appear together (Sundararajan et al. 2017,
                           "Axiomatic Attribution for Deep Networks")
    occlusion              how far f falls when one word is hidden: the plain experiment
    rollout                how much attention reaches the word (Abnar & Zuidema 2020, "Quantifying
                           Attention Flow in Transformers")

and `deletion_test` hides the words that an answer calls the most important, to see whether f falls.
Attention does worse there: it shows where a model looked, not why it answered as it did.

A hidden word is a [MASK], which pretraining has shown to the model everywhere. A [PAD] would be
something it has never seen: packed batches hold none.

Shapes: n tokens of one text, W words, B texts of a batch, H heads.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from minitune.attention import attention_weights
from minitune.batching import PackedBatch, reading_tokens
from minitune.model import Bert
from minitune.support.errors import UserError
from minitune.tokenizer import Tokenizer

FIRST_STEPS, MOST_STEPS = 32, 1024  # of the path of integrated gradients
GOOD_ERROR, WORST_ERROR = (
    0.02,
    0.05,
)  # of their sum: above the first more steps, above the second no trust
HIDDEN_WORDS, RANDOM_DRAWS = 10, 10  # of the deletion test


@dataclass
class Explanation:
    """What each word adds: `without_words` and the attributions add up to `difference`."""

    label: str  # the predicted one
    other: str  # the best of the others
    difference: float  # f of the text
    without_words: float  # f where each word is a [MASK]: what [CLS], [SEP] and positions say
    words: list[str]
    attributions: list[float]  # of each word, in logits
    steps: int  # of the path
    error: float = field(init=False)  # of the sum, as a share of what it should be (completeness)

    def __post_init__(self):
        change = self.difference - self.without_words
        self.error = abs(sum(self.attributions) - change) / max(abs(change), 1e-12)

    @property
    def trusted(self) -> bool:
        """Whether the sum is right within 5%."""
        return self.error <= WORST_ERROR


class Question:
    """A text, and f: why is its label this one, and not the best other one?"""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        ids: list[int],
        labels: dict[int, str],
        batch_tokens: int | None = None,
    ):
        """`model` gives logits (B, labels) for a packed batch, and its encoder is `model.bert`.

        `ids` run from [CLS] to [SEP]. All is computed in float32, `batch_tokens` at a time. Raises
        UserError for a text without ordinary tokens, those that `masking` may hide.
        """
        self.model, self.mask_id = model, tokenizer.mask_id
        self.ids = torch.tensor(ids, device=model.bert.embeddings.word.weight.device)  # (n,)
        self.words, self.word_of = words_of(self.ids.cpu(), tokenizer)
        if not self.words:
            raise UserError("nothing to explain: the text has no word that the model knows")
        self.word_of = self.word_of.to(self.ids.device)
        self.numbers = torch.arange(len(self.words), device=self.ids.device)  # of the words, (W,)
        self.without_words = self.hide(self.numbers)  # (n,): each of them a [MASK]
        budget = batch_tokens or reading_tokens(self.ids.device)
        self.texts_at_once = max(1, budget // len(ids))
        with torch.no_grad():
            self.logits = self.model(PackedBatch.from_sequences([self.ids]))[0].float().cpu()
        if not self.logits.isfinite().all():
            raise UserError("the model's answers are no numbers: its weights must be damaged")
        self.label, self.other = self.logits.topk(2).indices.tolist()
        self.label_names = labels[self.label], labels[self.other]
        self.value = (self.logits[self.label] - self.logits[self.other]).item()  # f of the text

    def f(self, batch: PackedBatch) -> Tensor:
        """(B,): the logit of the predicted label minus that of the other, for each text."""
        logits = self.model(batch).float()
        return logits[:, self.label] - logits[:, self.other]

    def hide(self, words: Tensor) -> Tensor:
        """The text (n,) with all tokens of these words, given by their numbers, masked."""
        return self.ids.masked_fill(torch.isin(self.word_of, words), self.mask_id)

    @torch.no_grad()
    def values(self, texts: list[Tensor]) -> Tensor:
        """f of texts that are as long as this one."""
        n = self.texts_at_once
        parts = [texts[i : i + n] for i in range(0, len(texts), n)]
        return torch.cat([self.f(PackedBatch.from_sequences(part)) for part in parts])

    def sum_of_words(self, of_tokens: Tensor) -> Tensor:
        """(n,) to (W,): the sum over the tokens of each word."""
        sums = of_tokens.new_zeros(len(self.words) + 1)  # one more, for [CLS] and [SEP]
        return sums.index_add(0, self.word_of, of_tokens)[:-1]


def words_of(ids: Tensor, tokenizer: Tokenizer) -> tuple[list[str], Tensor]:
    """The W words of a text (n,), and (n,) the number of the word that each token belongs to.

    Special tokens are in no word: [CLS], [SEP], and [UNK], which stands for what is not in the
    vocabulary. Their number is W.
    """
    ordinary = ~torch.isin(ids, tokenizer.special_ids)
    # A ## token continues a word, unless the token before it is a special one.
    begins = ordinary & ~(tokenizer.continuation[ids] & ordinary.roll(1))
    words: list[str] = []
    for token, is_ordinary, is_first in zip(ids.tolist(), ordinary, begins, strict=True):
        if is_first:
            words.append(tokenizer.token(token))
        elif is_ordinary:
            words[-1] += tokenizer.token(token).removeprefix("##")
    return words, torch.where(ordinary, begins.cumsum(0) - 1, len(words))


def explain(question: Question) -> Explanation:
    """Integrated gradients with as many steps as their sum needs: twice as many, until it fits."""
    without_words = question.values([question.without_words]).item()
    known = *question.label_names, question.value, without_words, question.words
    steps = FIRST_STEPS
    while True:
        attributions = question.sum_of_words(integrated_gradients(question, steps))
        found = Explanation(*known, attributions.tolist(), steps)
        if found.error <= GOOD_ERROR or steps == MOST_STEPS:
            return found
        steps *= 2


def integrated_gradients(question: Question, steps: int) -> Tensor:
    """(n,): what each token adds to f on the way from the text without words to the text.

    The way is a straight line between their word embeddings, e0 and e, and a token adds the part
    of the change of f that comes from its own embedding e_t:

        ∫ ∂f/∂e_t (e0 + a (e - e0)) · (e_t - e0_t) da,   a from 0 to 1.

    The sum over tokens is f(e) - f(e0), by the chain rule; a gradient at the text alone has no such
    sum, and is next to nothing where f is saturated. The integrand is the derivative of f by a, if
    each token had an a of its own. So autograd is asked for that, `shares` below: one number for
    each token instead of C. The integral is a sum over the middles of `steps` equal parts, all of
    them texts of packed batches.
    """
    n, total = len(question.ids), torch.zeros(len(question.ids), device=question.ids.device)
    middles = (torch.arange(steps, device=total.device) + 0.5) / steps
    for a in middles.split(question.texts_at_once):
        batch = PackedBatch.from_sequences([question.ids] * len(a))
        shares = a.repeat_interleave(n).requires_grad_()  # (T,), a of each token
        starts = question.without_words.repeat(len(a))  # (T,)

        # Called with the word embeddings of the batch, which its result replaces. (The default
        # values bind the tensors of this turn of the loop.)
        def between(word: nn.Embedding, _, embedded: Tensor, starts=starts, shares=shares):
            """The points on the line for T tokens, and below them rows that `pad_rows` added."""
            points = torch.lerp(
                F.embedding(starts, word.weight), embedded[: len(starts)], shares[:, None]
            )
            return torch.cat([points, embedded[len(starts) :]])

        with question.model.bert.embeddings.word.register_forward_hook(between):
            f = question.f(batch)
        (derivative,) = torch.autograd.grad(f.sum(), shares)
        total += derivative.view(-1, n).sum(0)
    return total / steps


def occlusion(question: Question) -> Tensor:
    """(W,): how far f falls when a word is hidden, each by itself."""
    texts = [question.hide(word) for word in question.numbers]
    return question.value - question.values(texts)


@torch.no_grad()
def attention_maps(bert: Bert, ids: Tensor) -> Tensor:
    """(layers, H, n, n): the attention weights of a text (n,), from each token (row) to each."""
    batch, maps = PackedBatch.from_sequences([ids]), []
    x = bert.embeddings(batch)
    for layer in bert.layers:
        qkv = layer.attention.qkv(x)[: len(ids)]
        q, k, _ = qkv.unflatten(1, (3, layer.attention.heads, -1)).unbind(1)
        maps.append(attention_weights(q, k))
        x = layer(x, batch)
    return torch.stack(maps)


def rollout(question: Question) -> Tensor:
    """(W,): how much of each word reaches the classifier, if attention were all that mixes tokens.

    In a layer half of a token stays, by the residual sum, and half comes from the tokens that it
    attends to, as the mean over heads says; layers multiply. It has no sign. The classifier reads
    [CLS], or the blank of a cloze, or by `mean` and `layers` pooling all tokens alike.
    """
    reached = torch.eye(len(question.ids), device=question.ids.device)
    for weights in attention_maps(question.model.bert, question.ids).mean(1):
        reached = 0.5 * (reached + weights @ reached)
    reads = {"cls": reached[0], "cloze": reached[getattr(question.model, "position", 0)]}
    read = reads.get(question.model.pooling, reached.mean(0))
    return question.sum_of_words(read)


def deletion_test(
    question: Question, explanation: Explanation, generator: Generator
) -> dict[str, dict[str, float]]:
    """For each way to rank the words, and "random": {"drop", "spearman"}.

    `drop` is how far f falls when the ten words of the highest rank are hidden, for random words
    the mean of ten draws. `spearman` is the rank correlation with occlusion over all words.
    """
    numbers = {
        "integrated gradients": torch.tensor(explanation.attributions),
        "occlusion": occlusion(question).cpu(),
        "attention rollout": rollout(question).cpu(),
    }
    chosen = [values.topk(HIDDEN_WORDS).indices for values in numbers.values()]
    for _ in range(RANDOM_DRAWS):
        chosen.append(torch.randperm(len(question.words), generator=generator)[:HIDDEN_WORDS])
    hidden = [question.hide(words.to(question.ids.device)) for words in chosen]
    drops = (question.value - question.values(hidden)).tolist()
    found = {
        name: {"drop": drop, "spearman": spearman(numbers[name], numbers["occlusion"])}
        for name, drop in zip(numbers, drops, strict=False)
    }
    return found | {"random": {"drop": sum(drops[-RANDOM_DRAWS:]) / RANDOM_DRAWS}}


def spearman(x: Tensor, y: Tensor) -> float:
    """The correlation of the ranks of two lists of different numbers."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (x, y)])
    return torch.corrcoef(ranks)[0, 1].item()
