"""Self-training: a model learns from reviews that nobody has labelled.

A prompt needs no label (prompting.py) and is right about most reviews. Its answers to thousands of
unlabelled reviews are what another model, the student, learns from. Three choices let the student
end above its teacher:

    several views  The prompt reads the end of a review, a bag of words reads all of it. They are
                   wrong about different reviews, so together they are right more often than either.
    sure answers   Only that half of the reviews is kept of which all views together are surest.
    balance        All labels are equally frequent in it; else the student would learn which label
                   the teacher prefers. So labels are taken to be equally frequent among all texts.

The second view is a bag of words (support/baselines.py) that learns from the surest answers and
from the labels that are given. It is fitted twice, on one half of the reviews each, and answers for
the other half: about its own it would repeat what it was told. Where labels are given, a third view
learns from these alone. The more there are, the more it counts. Labels that are given stay as they
are. No label of another row is read.

Two views: Blum & Mitchell 1998, "Combining Labeled and Unlabeled Data with Co-Training". A prompt
as the teacher: Schick & Schütze 2021, "Exploiting Cloze Questions for Few Shot Text
Classification", section 3.4.

Shapes: N texts, L labels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.batching import reading_tokens
from minitune.calibration import match_prior
from minitune.classification import Examples, TokenizedTexts
from minitune.experiment import Experiment, Setup
from minitune.methods import build, options_of
from minitune.support.baselines import NBSVM
from minitune.support.errors import plural
from minitune.support.runs import write_tensors
from minitune.support.tensor_file import TensorFile
from minitune.temperature import logits_of

KEPT = 0.5  # of the texts: those with the surest answers
HELD_OUT = 40  # one of so many texts without a label chooses the epoch
FOLDS = 2  # of the texts, for the second view
AS_MANY = 256  # with so many labels the third view counts half as much as another
ROUNDS = 2  # in each the bag of words is fitted again, to the answer of all views together


def surest(logs: Tensor, share: float = KEPT) -> np.ndarray:
    """Ascending indices of this share of the rows: the surest of each label, in equal numbers.

    The prior of `logs` (N, L) is matched, so that a row is among the surest of one label only.
    """
    count = int(share * len(logs) / logs.size(1))
    rows = [logs[:, label].topk(count).indices for label in range(logs.size(1))]
    return torch.cat(rows).unique().numpy()


def scaled_like(logs: Tensor, bag: NBSVM, texts: list[str]) -> Tensor:
    """The scores (N, L) of a bag of words, which are no probabilities, scaled to vary as `logs`."""
    scores = torch.from_numpy(bag.scores(texts)).float()
    return scores * (logs.std(0).mean() / scores.std(0).mean().clamp_min(1e-6))


def second_view(texts: list[str], logs: Tensor, known: dict[int, int]) -> Tensor:
    """Log-probabilities (N, L) by a bag of words that learned from the surest answers in `logs`.

    `known` has the labels that are given, by their rows. A text is answered by the bag of words of
    the other fold. Folds are drawn at random: rows may stand in an order. The prior is matched.
    """
    folds = np.random.default_rng(0).permutation(len(texts)) % FOLDS
    answers, view = logs.argmax(1).numpy(), torch.zeros_like(logs)
    answers[list(known)] = list(known.values())
    learned = np.union1d(surest(logs), np.array(list(known), dtype=int))
    for fold in range(FOLDS):
        others, mine = learned[folds[learned] != fold], np.flatnonzero(folds == fold)
        bag = NBSVM().fit([texts[i] for i in others], answers[others], logs.size(1))
        scores = scaled_like(logs, bag, [texts[i] for i in mine])
        view[torch.from_numpy(mine)] = scores + match_prior(scores)
    return view.log_softmax(1)


def all_views(texts: list[str], prompted: Tensor, known: dict[int, int]) -> Tensor:
    """Log-probabilities (N, L) by a prompt and by bags of words that learned from it and labels.

    `prompted` (N, L) are the prompt's. The prior is matched over all texts.
    """
    together = prompted = (prompted + match_prior(prompted)).log_softmax(1)
    weights, others = [1.0, 1.0], []
    if known:
        bag = NBSVM().fit([texts[i] for i in known], np.array([*known.values()]), prompted.size(1))
        weights.append(len(known) / (len(known) + AS_MANY))
        others.append(scaled_like(prompted, bag, texts).log_softmax(1))
    for _ in range(ROUNDS):
        views = [prompted, second_view(texts, together, known), *others]
        together = sum(weight * view for weight, view in zip(weights, views, strict=True))
        together = together / sum(weights)
        together = (together + match_prior(together)).log_softmax(1)
    return together


def taught_rows(inputs: TokenizedTexts, logs: Tensor, known: dict[int, int]) -> dict[str, Examples]:
    """What the student learns from, and what its epoch is chosen by.

    The surest rows, with the teacher's probabilities as labels, and all rows of `known`. The best
    epoch is the one that agrees most often with the teacher on other rows without a label, sure or
    not. Of few labels the N / 2 labelled validation rows would choose by chance.
    """
    probabilities, given = logs.exp(), np.array(list(known), dtype=int)
    for row, label in known.items():
        probabilities[row] = F.one_hot(torch.tensor(label), logs.size(1)).float()
    others = np.setdiff1d(np.arange(len(logs)), given)
    count = -(-len(others) // HELD_OUT)
    held_out = np.sort(np.random.default_rng(0).permutation(others)[:count])
    rows = np.union1d(np.setdiff1d(surest(logs), held_out), given)
    answers = logs.argmax(1)[torch.from_numpy(held_out)]
    return {
        "train": Examples(inputs, probabilities).select(rows),
        "validation": Examples(inputs.select(held_out), answers),
    }


def ask_prompt(setup: Setup) -> Tensor:
    """Log-probabilities (N, L) of the training rows, by one template."""
    if setup.prompted is None:
        options = options_of("prompt", setup.args) | {"template": setup.args.template[:1]}
        model = build("prompt", setup.source, setup.reviews.names, setup.attention, **options)
        model.to(setup.runtime.device)
        rows, size = setup.read(model)["train"], reading_tokens(setup.runtime.device)
        setup.prompted = logits_of(model, rows, len(setup.reviews.names), size, setup.runtime)
    return setup.prompted


def ask_teacher(experiment: Experiment, setup: Setup, known: dict[int, int]) -> Tensor:
    """Log-probabilities (N, L) of all training rows, by a prompt and by bags of words.

    UserError where the answers of a run that is resumed are damaged.
    """
    path, key = experiment.run.state_path.with_name("teacher.safetensors"), tuple(known.items())
    texts, count = setup.reviews.texts["train"], len(setup.reviews.names)
    if path.is_file():  # the run is resumed
        setup.teachers[key] = TensorFile(path, "the data").read("logs", (len(texts), count))
    if key not in setup.teachers:
        setup.runtime.log(f"the teacher: a prompt and bags of words, {plural(len(key), 'label')}")
        setup.teachers[key] = all_views(texts, ask_prompt(setup), known)
    if setup.runtime.is_main and not path.is_file():
        write_tensors(path, {"logs": setup.teachers[key]}, {})
    return setup.teachers[key]
