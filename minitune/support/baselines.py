"""Baselines, which stand beside fine-tuning in a table of results: majority class and NB-SVM.

NB-SVM (Wang & Manning 2012, "Baselines and Bigrams") is a linear classifier on single words and
pairs of neighbours. Each is weighted beforehand by how much more often it stands in texts of one
class than in the others, as naive Bayes would count it; a support vector machine then learns the
rest.
"""

import re
import time
from typing import NamedTuple

import numpy as np

from minitune.tokenizer import clean

WORD = re.compile(r"[\w']+|[^\w\s']+")  # a run of punctuation is a word too: "!!!" says something
SMOOTHING = 1.0  # alpha of the paper: added to every count


def majority(labels: np.ndarray, num_labels: int) -> int:
    """The most frequent label; the lowest of them where several are equally frequent."""
    return int(np.bincount(labels, minlength=num_labels).argmax())


class Matrix(NamedTuple):
    """A sparse matrix of zeros and ones, as the places of the ones: (rows[i], columns[i]) for every i."""

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
    """Fit on texts and labels 0..num_labels-1, then predict. More than two labels: one against the rest."""

    def fit(self, texts: list[str], labels: np.ndarray, num_labels: int) -> "NBSVM":
        """Learn one vector of weights a label: an entry for each feature, and last the bias."""
        labels = np.asarray(labels, dtype=np.int64)
        self.words = {}  # word -> id
        rows, grams = self._grams(texts, learn=True)
        self.features = _distinct(grams)
        matrix = self._matrix(rows, grams, len(texts))
        if num_labels == 2:  # class 0 against the rest is class 1 against the rest, negated
            weights = _fit_one(matrix, labels == 1)
            self.weights = np.stack([-weights, weights])
        else:
            self.weights = np.stack(
                [_fit_one(matrix, labels == label) for label in range(num_labels)]
            )
        self.seen = np.bincount(labels, minlength=num_labels) > 0
        return self

    def predict(self, texts: list[str]) -> np.ndarray:
        """The label of each text. A text without any known word gets its label from the biases."""
        matrix = self._matrix(*self._grams(texts), len(texts))
        scores = np.stack([matrix.times(weights) for weights in self.weights], axis=1)
        # A label without a training text is never the answer: nothing is known of it.
        return np.where(self.seen, scores, -np.inf).argmax(axis=1)

    def _grams(self, texts: list[str], learn: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(text, number) of every known word and of every pair of known words side by side.

        Of V words, word i has the number i, and the pair i, j the number (i + 1) * V + j. Unlike
        strings, numbers can be sorted and counted by numpy. `learn` first gives new words an id.
        """
        ids, lengths = [], []
        for text in texts:
            found = WORD.findall(clean(text).lower())
            if learn:
                for word in found:
                    self.words.setdefault(word, len(self.words))
            ids += [self.words.get(word, -1) for word in found]
            lengths.append(len(found))
        ids = np.array(ids, dtype=np.int64)
        rows = np.repeat(np.arange(len(texts)), np.array(lengths, dtype=np.int64))
        known = ids >= 0
        pair = known[:-1] & known[1:] & (rows[:-1] == rows[1:])
        pairs = (ids[:-1] + 1) * len(self.words) + ids[1:]
        return np.concatenate([rows[known], rows[1:][pair]]), np.concatenate(
            [ids[known], pairs[pair]]
        )

    def _matrix(self, rows: np.ndarray, grams: np.ndarray, texts: int) -> Matrix:
        """A row for each text: which features it holds, however often, and a last column of ones."""
        width = len(self.features) + 1
        columns = np.searchsorted(self.features, grams)
        known = self.features.take(columns, mode="clip") == grams
        places = _distinct(rows[known] * width + columns[known])
        rows, columns = np.divmod(places, width)
        rows = np.concatenate([rows, np.arange(texts)])
        columns = np.concatenate([columns, np.full(texts, width - 1)])
        return Matrix(rows, columns, (texts, width))


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """The numbers (none negative) in order, each once. np.unique may hash them, many times slower here."""
    numbers = np.sort(numbers)
    return numbers[np.diff(numbers, prepend=-1) > 0]


def _fit_one(matrix: Matrix, positive: np.ndarray) -> np.ndarray:
    """Weights whose product with a row is above zero for texts of the class.

    An error costs 1 / mean |x|^2, the default of SVMlight (Joachims 1999), which suits long reviews
    and single sentences alike. The paper also mixes the weights with their mean; at this cost that
    adds nothing.
    """
    scale = log_count_ratio(matrix, positive)
    cost = 1 / matrix.times(scale**2).mean()
    return scale * train_svm(matrix, scale, np.where(positive, 1.0, -1.0), cost)


def log_count_ratio(matrix: Matrix, positive: np.ndarray) -> np.ndarray:
    """The paper's r: log of a feature's share of the class over its share of the rest; 1 for the bias."""
    inside = SMOOTHING + matrix.transposed_times(positive.astype(float))[:-1]
    outside = SMOOTHING + matrix.transposed_times((~positive).astype(float))[:-1]
    return np.append(np.log(inside / inside.sum()) - np.log(outside / outside.sum()), 1.0)


def train_svm(
    matrix: Matrix, scale: np.ndarray, signs: np.ndarray, cost: float, tolerance: float = 1e-3
) -> np.ndarray:
    """The w that minimises |w|^2 / 2 + cost * sum max(0, 1 - signs * (x @ w))^2, where x is matrix * scale.

    Conjugate gradients (Polak & Ribiere 1969), each step to the lowest point along its line. |w|^2
    / 2 alone bends the objective so much that its minimum cannot lie more than |gradient|^2 / 2
    lower: training stops where that is the share `tolerance` of the objective.
    """
    weights, direction = np.zeros(matrix.shape[1]), np.zeros(matrix.shape[1])
    margins = np.zeros(len(signs))  # signs * (x @ weights)
    previous, previous_square = 0.0, np.inf  # the first direction keeps nothing of one before
    for _ in range(200):  # about 20 are needed
        slack = np.maximum(0, 1 - margins)
        gradient = weights - 2 * cost * scale * matrix.transposed_times(signs * slack)
        square = gradient @ gradient
        if square / 2 <= tolerance * (weights @ weights / 2 + cost * slack @ slack):
            break
        keep = max(0.0, gradient @ (gradient - previous) / previous_square)
        direction = keep * direction - gradient
        previous, previous_square = gradient, square

        # Along a line the objective is a chain of parabolas; Newton's method soon finds the lowest
        # point.
        change = signs * matrix.times(scale * direction)
        slope, bend, length = weights @ direction, direction @ direction, 0.0
        for _ in range(10):
            slack = np.maximum(0, 1 - margins - length * change)
            downhill = 2 * cost * change @ slack - slope - length * bend
            length += downhill / (bend + 2 * cost * change**2 @ (slack > 0))
        weights += length * direction
        margins += length * change
    return weights


def evaluate_baselines(
    texts: dict[str, list[str]], labels: dict, num_labels: int, chosen: np.ndarray | None = None
) -> list[dict]:
    """Test accuracy of each baseline. `texts` and `labels` (0..num_labels-1) have "train" and "test";
    `chosen`: the indices of the train rows to learn from, None for all."""
    train, test = np.asarray(labels["train"]), np.asarray(labels["test"])
    chosen = np.arange(len(train)) if chosen is None else chosen
    answer = majority(train[chosen], num_labels)
    rows = [{"method": "majority", "accuracy": float((test == answer).mean())}]
    started = time.monotonic()
    model = NBSVM().fit([texts["train"][i] for i in chosen], train[chosen], num_labels)
    seconds = round(time.monotonic() - started, 1)
    accuracy = float((model.predict(texts["test"]) == test).mean())
    rows.append({"method": "nb-svm", "accuracy": accuracy, "train_seconds": seconds})
    return [row | {"train_examples": len(chosen)} for row in rows]
