"""NB-SVM in its best form: how long its n-grams are and what an error costs, by validation rows.

    python -m tests.benchmarks.bag_of_words --data imdb             about seven minutes, 3 GB
    python -m tests.benchmarks.bag_of_words --data imdb --check     beside scikit-learn

Prints the validation accuracy of each choice, and the test accuracy of the best one alone. --check
fits the default NB-SVM with scikit-learn too (it needs an environment with scikit-learn, checked
with 1.9): the features must be the same, and so must the answers but for those at the border.
"""

import argparse
import re
import time

import numpy as np

from minitune.data import Dataset, Reviews
from minitune.support.baselines import NBSVM, WORD, log_count_ratio
from minitune.support.results import interval
from minitune.support.tokenizer_files import MARKUP

LONGEST, COSTS = (1, 2, 3), (0.1, 0.3, 1.0, 3.0, 10.0)


def choose(reviews: Reviews) -> tuple[int, float]:
    """(words of an n-gram, cost) with the highest validation accuracy; of equals the first."""
    labels, best = {split: reviews.labels[split].numpy() for split in reviews.labels}, (0.0, 0, 0.0)
    print("words  cost  validation  seconds")
    for longest in LONGEST:
        for cost in COSTS:
            started = time.monotonic()
            model = NBSVM(longest, cost).fit(
                reviews.texts["train"], labels["train"], len(reviews.names)
            )
            right = (model.predict(reviews.texts["validation"]) == labels["validation"]).mean()
            seconds = time.monotonic() - started
            print(f"{longest:5}  {cost:4}  {right:10.2%}  {seconds:7.1f}", flush=True)
            if right > best[0]:
                best = right, longest, cost
    return best[1:]


def score(reviews: Reviews, longest: int, cost: float) -> None:
    """Fit one NB-SVM and print its accuracy on the test rows."""
    model = NBSVM(longest, cost).fit(
        reviews.texts["train"], reviews.labels["train"].numpy(), len(reviews.names)
    )
    answers, labels = model.predict(reviews.texts["test"]), reviews.labels["test"].numpy()
    accuracy = (answers == labels).mean()
    low, high = interval(accuracy, len(labels))
    print(f"n-grams of up to {longest} words, cost {cost}: {accuracy:.2%} of {len(labels):,} test")
    print(f"rows, 95% interval {low:.1%} to {high:.1%}")


def check(reviews: Reviews) -> None:
    """The default NB-SVM beside that of scikit-learn, on validation rows, two labels."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.svm import LinearSVC

    train, validation = reviews.texts["train"], reviews.texts["validation"]
    labels = reviews.labels["train"].numpy()
    ours = NBSVM().fit(train, labels, 2)
    counter = CountVectorizer(
        preprocessor=lambda text: re.sub(MARKUP, " ", text).lower(),
        token_pattern=WORD.pattern,
        ngram_range=(1, 2),
        binary=True,
    )
    counts = counter.fit_transform(train).astype(float)
    assert counts.shape[1] == len(ours.features), (counts.shape, len(ours.features))
    inside = 1 + np.asarray(counts[labels == 1].sum(0)).ravel()
    outside = 1 + np.asarray(counts[labels == 0].sum(0)).ravel()
    ratio = np.log(inside / inside.sum()) - np.log(outside / outside.sum())
    matrix = ours._matrix(train)
    apart = np.abs(np.sort(ratio) - np.sort(log_count_ratio(matrix, labels == 1)[:-1])).max()
    assert apart < 1e-9, apart
    scaled = counts.multiply(ratio).tocsr()
    cost = 1 / (1 + np.asarray(scaled.multiply(scaled).sum(1)).mean())  # 1: the bias
    svm = LinearSVC(C=cost, loss="squared_hinge", dual=True, tol=1e-6, max_iter=100_000)
    svm.fit(scaled, labels)
    theirs = svm.decision_function(counter.transform(validation).multiply(ratio).tocsr())
    mine = ours.scores(validation)[:, 1]
    weights = np.append(svm.coef_[0], svm.intercept_[0])
    both = hstack([scaled, np.ones((len(train), 1))]).tocsr()
    signs, w = np.where(labels == 1, 1.0, -1.0), ours.weights[1]
    # Our weights are per n-gram, theirs per scaled n-gram: compare the value that both minimise.
    lowest = weights @ weights / 2
    lowest += cost * (np.maximum(0, 1 - signs * (both @ weights)) ** 2).sum()
    scale = log_count_ratio(matrix, labels == 1)
    per_scaled = np.divide(w, scale, out=np.zeros_like(w), where=scale != 0)
    found = per_scaled @ per_scaled / 2
    found += cost * (np.maximum(0, 1 - signs * matrix.times(w)) ** 2).sum()
    print(f"{counts.shape[1]:,} n-grams in both; log-count ratios within {apart:.0e}")
    print(f"what is minimised: minitune {found:.3f}, scikit-learn {lowest:.3f}")
    print(f"validation scores apart by at most {np.abs(mine - theirs).max():.4f}")
    right = reviews.labels["validation"].numpy()
    accuracies = [((scores > 0) == right).mean() for scores in (mine, theirs)]
    differ = ((mine > 0) != (theirs > 0)).sum()
    print("validation accuracy: minitune {:.2%}, scikit-learn {:.2%};".format(*accuracies), end=" ")
    print(f"{differ} of {len(right):,} answers differ")
    assert found < lowest * (1 + 2e-3) and differ <= 0.005 * len(right)


def main() -> None:
    """What the options say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="imdb")
    parser.add_argument("--check", action="store_true", help="compare with scikit-learn")
    args = parser.parse_args()
    reviews = Reviews.load(Dataset(args.data))
    if args.check:
        check(reviews)
    else:
        score(reviews, *choose(reviews))


if __name__ == "__main__":
    main()
