"""A network and a bag of words that answer together.

    python finetune.py --method full --bag

NB-SVM (support/baselines.py) reads all of a review, and knows no order but that of neighbouring
words. A network knows order, and reads the two ends of a long review. Each is right about some
reviews that the other gets wrong, so together they can be right more often than either (Mesnil et
al. 2014, "Ensemble of Generative and Discriminative Techniques for Sentiment Analysis of Movie
Reviews"). Both have learned from the same train rows, each by itself. Two numbers join them:

    p(label | text) = softmax(network * logits + bag * scores)

They are fitted on the validation rows. On its train rows NB-SVM is nearly always right, and would
be trusted too much.

    bag.json    the two numbers, figures of the test rows, and the weights of the n-grams

The network's files stay as they are, and load without the bag. Shapes: N texts, L labels.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.data import Reviews
from minitune.support.baselines import NBSVM
from minitune.support.errors import UserError
from minitune.support.runs import read_json, write_atomically
from minitune.temperature import score

NGRAMS = 1 << 17  # are saved, those with the largest weights; the others hardly change a score
WEIGHTS = 1 << 20  # are saved at most: with many labels fewer n-grams


def fit_ensemble(voters: list[Tensor], labels: Tensor) -> list[float]:
    """The weights w for which softmax(sum of w[k] * voters[k]) has the smallest loss.

    `voters` are logits (N, L) of the same texts, `labels` (N,). The sum of the losses gets half the
    squared distance of w from ones added: of few rows the loss alone may have no minimum.
    """
    stacked = torch.stack(voters).double()  # (voters, N, L)
    weights = torch.ones(len(voters), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        together = torch.einsum("k,knl->nl", weights, stacked)
        total = F.cross_entropy(together, labels, reduction="sum")
        total = total + (weights - 1).square().sum() / 2
        total.backward()
        return total

    optimizer.step(loss)
    return weights.tolist()


@dataclass
class Bag:
    """A bag of words and how much it counts beside a network."""

    model: NBSVM
    network: float = 1.0  # weight of the network's logits
    bag: float = 1.0  # weight of the bag's scores

    def fit(self, logits: Tensor, texts: list[str], labels: Tensor) -> None:
        """Find both weights, from the network's logits (N, L) for validation texts."""
        scores = torch.from_numpy(self.model.scores(texts))
        self.network, self.bag = fit_ensemble([logits, scores], labels)

    def together(self, logits: Tensor, texts: list[str]) -> Tensor:
        """The logits (N, L) of the ensemble, from those of the network for these texts."""
        return self.network * logits + self.bag * torch.from_numpy(self.model.scores(texts)).float()

    def save(self, directory: Path, figures: dict) -> None:
        """Write bag.json, with figures of the ensemble."""
        content = {"network": self.network, "bag": self.bag, "figures": figures}
        content["ngrams"] = self.model.ngrams(NGRAMS)
        write_atomically(directory / "bag.json", json.dumps(content, ensure_ascii=False).encode())

    @classmethod
    def load(cls, directory: Path, num_labels: int) -> "Bag | None":
        """From bag.json; None where there is none. UserError where it is damaged."""
        path = directory / "bag.json"
        if not path.is_file():
            return None
        raw = read_json(path)
        try:
            model = NBSVM.from_ngrams(raw["ngrams"])
            weights = float(raw["network"]), float(raw["bag"])
            if len(model.weights) != num_labels or not np.isfinite([*weights]).all():
                raise ValueError("its numbers do not fit")
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path} is damaged: {error!r}") from error
        return cls(model, *weights)


def add_bag(directory: Path, nb_svm: NBSVM, reviews: Reviews, size: int | None, seed: int) -> None:
    """Give a finished run a bag of words: fit it on validation rows, score it on the test rows.

    `nb_svm` has learned from the train rows of the run, `size` rows chosen by the `seed`, or all.
    """
    answers = read_json(directory / "answers.json")
    logits, labels = (
        {split: torch.tensor(answers[split][key]) for split in ("validation", "test")}
        for key in ("logits", "labels")
    )
    texts = reviews.texts["validation"]
    if size:
        rows = reviews.balanced_subset("validation", len(labels["validation"]), seed)
        texts = [texts[i] for i in rows]
    kept = nb_svm.ngrams(min(NGRAMS, WEIGHTS // len(nb_svm.weights)))
    bag = Bag(NBSVM.from_ngrams(kept))
    bag.fit(logits["validation"], texts, labels["validation"])
    validation = score(bag.together(logits["validation"], texts), labels["validation"])
    test = score(bag.together(logits["test"], reviews.texts["test"]), labels["test"])
    metrics = read_json(directory / "metrics.json")
    figures = {"method": f"{metrics['method']} + bag"} | test
    figures |= {f"validation_{key}": value for key, value in validation.items()}
    bag.save(directory, figures | {key: metrics[key] for key in ("train_examples", "seed")})


def ensemble_figures(directory: Path) -> list[dict]:
    """The row of a run with its bag, for a table; none without. UserError if it is damaged."""
    if not (directory / "bag.json").is_file():
        return []
    figures = read_json(directory / "bag.json").get("figures")
    try:
        kinds = [type(figures[key]) for key in ("method", "accuracy", "train_examples", "seed")]
    except (KeyError, TypeError):
        kinds = []
    if kinds != [str, float, int, int]:
        raise UserError(f"{directory / 'bag.json'} is damaged: it has no figures")
    return [figures]
