"""Baselines to compare fine-tuning with: the majority class, and NB-SVM.

NB-SVM (Wang & Manning 2012, "Baselines and Bigrams") is a linear classifier. Its features are
n-grams: the words of a text and the pairs of neighbouring words. Each feature is scaled by its
naive Bayes weight: how much more often it stands in texts of one class than in others. A linear
support vector machine is trained on the scaled features.
"""

import re
import time
from typing import NamedTuple

import numpy as np

from minitune.support.results import macro_f1
from minitune.support.tokenizer_files import MARKUP

WORD = re.compile(r"[\w']+|[^\w\s']+")  # punctuation counts as a word: "!!!" tells something
SMOOTHING = 1.0  # alpha of the paper: added to every count


def majority(labels: np.ndarray, num_labels: int) -> int:
    """The most frequent label; the lowest of them where several are equally frequent."""
    return int(np.bincount(labels, minlength=num_labels).argmax())


class Matrix(NamedTuple):
    """A sparse matrix of zeros and ones; these are at (rows[i], columns[i]) for every i."""

    rows: np.ndarray
    columns: np.ndarray
    shape: tuple[int, int]

    def times(self, vector: np.ndarray) -> np.ndarray:
        """Matrix @ vector."""
        return np.bincount(self.rows, weights=vector[self.columns], minlength=self.shape[0])

    def transposed_times(self, vector: np.ndarray) -> np.ndarray:
        """Matrix.T @ vector."""
        return np.bincount(self.columns, weights=vector[self.rows], minlength=self.shape[1])


class NBSVM:
    """A linear classifier of texts for labels 0..num_labels-1, each label against the rest."""

    def __init__(self, longest: int = 2, cost: float = 1.0):
        """Its n-grams have up to `longest` words; `cost` multiplies that of an error."""
        self.longest, self.cost = longest, cost

    def fit(self, texts: list[str], labels: np.ndarray, num_labels: int) -> "NBSVM":
        """Learn a vector of weights for each label: one for each feature, and last the bias."""
        self.words: dict[str, int] = {}
        matrix = self._matrix(texts, learn=True)
        if num_labels == 2:  # class 0 against the rest is class 1 against the rest, negated
            weights = _fit_one(matrix, labels == 1, self.cost)
            self.weights = [-weights, weights]
        else:
            each = (labels == label for label in range(num_labels))
            self.weights = [_fit_one(matrix, positive, self.cost) for positive in each]
        self.seen = np.bincount(labels, minlength=num_labels) > 0
        return self

    def scores(self, texts: list[str]) -> np.ndarray:
        """(N, num_labels): how far each text is on the side of each label."""
        matrix = self._matrix(texts)
        return np.stack([matrix.times(weights) for weights in self.weights], axis=1)

    def predict(self, texts: list[str]) -> np.ndarray:
        """The label of each text. A text without any known word gets its label from the biases."""
        # A label without a training text is never the answer.
        return np.where(self.seen, self.scores(texts), -np.inf).argmax(axis=1)

    def ngrams(self, count: int) -> dict[str, list[float]]:
        """The `count` n-grams with the largest weights, and the weights of each; "": the biases.

        An n-gram has a weight for each label. Of two labels the first one's is left out, since it
        is the second one's with the other sign.
        """
        weights = np.stack(self.weights[-1:] if len(self.weights) == 2 else self.weights)
        order = np.argsort(-np.abs(weights[:, :-1]).max(0), kind="stable")[:count]
        columns = [[float(f"{w:.4g}") for w in column] for column in weights[:, order].T]
        words = ["", *self.words]
        found = {"": weights[:, -1].tolist()}
        for number, column in zip(self.features[order].tolist(), columns, strict=True):
            ngram = []
            while number:
                number, digit = divmod(number, len(words))
                ngram.insert(0, words[digit])
            found[" ".join(ngram)] = column
        return found

    @classmethod
    def from_ngrams(cls, ngrams: dict[str, list[float]]) -> "NBSVM":
        """One with the scores of that whose `ngrams` these are, and a score of 0 for all others.

        Raises KeyError, TypeError, ValueError or OverflowError where they make no sense.
        """
        names = [name for name in ngrams if name]
        split = [name.split(" ") for name in names]
        model = cls(longest=max(map(len, split), default=1))
        words = dict.fromkeys(word for ngram in split for word in ngram)
        model.words = {word: number for number, word in enumerate(words, start=1)}
        base, numbers = len(words) + 1, []
        for ngram in split:
            numbers.append(0)
            for word in ngram:
                numbers[-1] = numbers[-1] * base + model.words[word]
        order = np.argsort(np.array(numbers, dtype=np.int64))
        model.features = np.array(numbers, dtype=np.int64)[order]
        weights = np.array([ngrams[names[i]] for i in order] + [ngrams[""]], dtype=float).T
        if not (weights.ndim == 2 and len(weights) and np.isfinite(weights).all()):
            raise ValueError("an n-gram without its weights")
        model.weights = [-weights[0], weights[0]] if len(weights) == 1 else list(weights)
        model.seen = np.ones(len(model.weights), dtype=bool)
        return model

    def _matrix(self, texts: list[str], learn: bool = False) -> Matrix:
        """A row for each text: 1 where it has a feature, else 0. The last column (bias) is 1.

        Features are numbered, so that numpy can sort and count them: V known words have the numbers
        1 to V, and an n-gram has those of its words as digits in base V + 1. `learn` adds the words
        and features of these texts to the known ones.
        """
        ids, lengths = [], []
        for text in texts:
            found = WORD.findall(re.sub(MARKUP, " ", text).lower())
            if learn:
                for word in found:
                    self.words.setdefault(word, len(self.words) + 1)
            ids += [self.words.get(word, 0) for word in found]
            lengths.append(len(found))
        words, rows = np.array(ids, dtype=np.int64), np.repeat(np.arange(len(texts)), lengths)
        features, texts_of = [words[words > 0]], [rows[words > 0]]
        grams, known = words, words > 0
        for n in range(1, self.longest):  # a known word more, of the same text
            grams = grams[:-1] * (len(self.words) + 1) + words[n:]
            known = known[:-1] & (words[n:] > 0) & (rows[:-n] == rows[n:])
            features.append(grams[known])
            texts_of.append(rows[n:][known])
        features, rows = np.concatenate(features), np.concatenate(texts_of)
        if learn:
            self.features = _distinct(features)
        columns, width = np.searchsorted(self.features, features), len(self.features) + 1
        known = self.features.take(columns, mode="clip") == features
        last = np.arange(1, len(texts) + 1) * width - 1  # of each row, the column of the bias
        cells = _distinct(np.concatenate([rows[known] * width + columns[known], last]))
        return Matrix(*np.divmod(cells, width), (len(texts), width))


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """The non-negative numbers in order, each once; faster than np.unique, which may hash them."""
    numbers = np.sort(numbers)
    return numbers[np.diff(numbers, prepend=-1) > 0]


def _fit_one(matrix: Matrix, positive: np.ndarray, cost: float) -> np.ndarray:
    """Weights with a positive score (matrix @ weights) for texts of the class.

    The cost of an error is `cost` / mean |x|^2. A `cost` of 1 is the default of SVMlight (Joachims
    1999), which suits long reviews and single sentences alike. The paper also interpolates the
    weights with their mean; with this cost that does not help.
    """
    scale = log_count_ratio(matrix, positive)
    cost /= matrix.times(scale**2).mean()
    return scale * train_svm(matrix, scale, np.where(positive, 1.0, -1.0), cost)


def log_count_ratio(matrix: Matrix, positive: np.ndarray) -> np.ndarray:
    """The paper's r: the log-ratio of a feature's share in the class and in the rest; bias: 1."""
    inside = SMOOTHING + matrix.transposed_times(positive.astype(float))[:-1]
    outside = SMOOTHING + matrix.transposed_times((~positive).astype(float))[:-1]
    return np.append(np.log(inside / inside.sum()) - np.log(outside / outside.sum()), 1.0)


def train_svm(
    matrix: Matrix, scale: np.ndarray, signs: np.ndarray, cost: float, tolerance: float = 1e-3
) -> np.ndarray:
    """The w that minimises |w|^2 / 2 + cost * sum max(0, 1 - signs * (x @ w))^2.

    Here x is matrix * scale. The method is conjugate gradients (Polak & Ribiere 1969) with an exact
    line search. Because of the term |w|^2 / 2 the objective is strongly convex: its minimum is at
    most |gradient|^2 / 2 below the present value. Training stops where that is less than the share
    `tolerance` of the present value.
    """
    weights, direction = np.zeros(matrix.shape[1]), np.zeros(matrix.shape[1])
    margins = np.zeros(len(signs))  # signs * (x @ weights)
    previous, previous_square = 0.0, np.inf  # so that the first direction is the gradient's
    for _ in range(200):  # about 20 are needed
        slack = np.maximum(0, 1 - margins)
        gradient = weights - 2 * cost * scale * matrix.transposed_times(signs * slack)
        square = gradient @ gradient
        if square / 2 <= tolerance * (weights @ weights / 2 + cost * slack @ slack):
            break
        keep = max(0.0, gradient @ (gradient - previous) / previous_square)
        direction = keep * direction - gradient
        previous, previous_square = gradient, square

        # Line search. Along a line the objective is piecewise quadratic, so Newton's method needs
        # a few steps only.
        change = signs * matrix.times(scale * direction)
        slope, curvature, length = weights @ direction, direction @ direction, 0.0
        for _ in range(10):
            slack = np.maximum(0, 1 - margins - length * change)
            descent = 2 * cost * change @ slack - slope - length * curvature
            length += descent / (curvature + 2 * cost * change**2 @ (slack > 0))
        weights += length * direction
        margins += length * change
    return weights


def evaluate_baselines(
    texts: dict[str, list[str]], labels: dict, num_labels: int, chosen: np.ndarray | None = None
) -> list[dict]:
    """The rows of `answer_test_rows`, without the answers."""
    return [row for row, _ in answer_test_rows(texts, labels, num_labels, chosen)]


def answer_test_rows(
    texts: dict[str, list[str]],
    labels: dict,
    num_labels: int,
    chosen: np.ndarray | None = None,
    model: NBSVM | None = None,
) -> list[tuple[dict, np.ndarray]]:
    """A row for each baseline, with its test accuracy and macro F1, and its label of each test row.

    `texts` and `labels` (0..num_labels-1) are those of "train" and "test", `chosen` the indices of
    the train rows to use, None for all. `model` is the NB-SVM to fit, None for a new one.
    Without any row no baseline can be trained, and none comes back.
    """
    train, test = np.asarray(labels["train"]), np.asarray(labels["test"])
    chosen = np.arange(len(train)) if chosen is None else chosen
    if not len(chosen):
        return []
    started, known = time.monotonic(), train[chosen]
    model = (model or NBSVM()).fit([texts["train"][i] for i in chosen], known, num_labels)
    seconds = round(time.monotonic() - started, 2)
    always = np.full_like(test, majority(known, num_labels))
    found = []
    for method, answers in (("majority", always), ("nb-svm", model.predict(texts["test"]))):
        row = {"method": method, "accuracy": float((answers == test).mean())}
        row |= {"macro_f1": macro_f1(test.tolist(), answers.tolist())}
        row |= {"train_seconds": seconds} if method == "nb-svm" else {}
        found.append((row | {"train_examples": len(chosen)}, answers))
    return found
