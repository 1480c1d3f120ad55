"""Self-training: a model learns from reviews that nobody has labelled.

A prompt needs no label (prompting.py) and is right about most reviews. Its answers to thousands of
unlabelled reviews are what another model, the student, learns from. Three choices let the student
end above its teacher:

    two views      The prompt reads the end of a review, a bag of words reads all of it. They are
                   wrong about different reviews, so their mean is right more often than either.
    sure answers   Only the half of the reviews is kept of which both together are surest.
    balance        All labels are equally frequent in it; else the student would learn which label
                   the teacher prefers.

The bag of words (support/baselines.py) learns from the surest answers. It then answers for reviews
that it has not learned from: about the others it would repeat what it was told.

Labels that are given stay as they are. No label of another row is read. Two views: Blum & Mitchell
1998, "Combining Labeled and Unlabeled Data with Co-Training". A prompt as the teacher: Schick &
Schütze 2021, "Exploiting Cloze Questions for Few Shot Text Classification", section 3.4.

Shapes: N texts, L labels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from minitune.batching import reading_tokens
from minitune.calibration import match_prior, mean_log_probabilities
from minitune.classification import Examples, TokenizedTexts
from minitune.experiment import Experiment, Setup, choose_rows, choose_unlabelled
from minitune.methods import METHODS, build, options_of
from minitune.soup import train
from minitune.support.baselines import NBSVM
from minitune.support.errors import plural
from minitune.support.runs import Run, write_tensors
from minitune.temperature import logits_of

KEPT = 0.5  # of the texts: those with the surest answers
HELD_OUT = 40  # every so many texts one chooses the epoch, where no label is given
FOLDS = 2  # of the texts, for the second view
ROUNDS = 2  # in each the bag of words is fitted again, to the mean of both views


def surest(logs: Tensor, share: float = KEPT) -> np.ndarray:
    """Ascending indices of this share of the rows: the surest of each label, in equal numbers."""
    count = int(share * len(logs) / logs.size(1))
    rows = [logs[:, label].topk(count).indices for label in range(logs.size(1))]
    return torch.cat(rows).unique().numpy()


def second_view(texts: list[str], logs: Tensor, known: dict[int, int]) -> Tensor:
    """Log-probabilities (N, L) by a bag of words that learned from the surest answers in `logs`.

    `known` has the labels that are given, by their rows. A text is answered by the bag of words of
    the other fold. Scores of an NB-SVM are no probabilities: they are scaled to vary as much as
    `logs` do from text to text, and the prior is matched.
    """
    answers, scores = logs.argmax(1).numpy(), torch.zeros_like(logs)
    answers[list(known)] = list(known.values())
    learned = np.union1d(surest(logs), np.array(list(known), dtype=int))
    for fold in range(FOLDS):
        others, mine = learned[learned % FOLDS != fold], range(fold, len(texts), FOLDS)
        bag = NBSVM().fit([texts[i] for i in others], answers[others], logs.size(1))
        found = torch.from_numpy(bag.scores([texts[i] for i in mine])).float()
        found *= logs.std(0).mean() / found.std(0).mean().clamp_min(1e-6)
        scores[fold::FOLDS] = found + match_prior(found)
    return scores.log_softmax(1)


def both_views(texts: list[str], prompted: Tensor, known: dict[int, int]) -> Tensor:
    """Log-probabilities (N, L) by a prompt and a bag of words that learned from each other.

    `prompted` (N, L) are the prompt's; the prior is matched over all texts.
    """
    both = prompted = (prompted + match_prior(prompted)).log_softmax(1)
    for _ in range(ROUNDS):
        both = mean_log_probabilities([prompted, second_view(texts, both, known)])
        both = (both + match_prior(both)).log_softmax(1)
    return both


def taught_rows(inputs: TokenizedTexts, logs: Tensor, known: dict[int, int]) -> dict[str, Examples]:
    """What the student learns from, and, where no label is given, what its epoch is chosen by.

    The surest rows, with the teacher's probabilities as labels, and all rows of `known`. Without
    these the best epoch is the one that agrees most often with the teacher on other rows, sure or
    not.
    """
    probabilities, rows = logs.exp(), surest(logs)
    for row, label in known.items():
        probabilities[row] = F.one_hot(torch.tensor(label), logs.size(1)).float()
    examples = {}
    if not known:
        held_out = np.arange(0, len(logs), HELD_OUT)
        rows = np.setdiff1d(rows, held_out)
        answers = logs.argmax(1)[torch.from_numpy(held_out)]
        examples["validation"] = Examples(inputs.select(held_out), answers)
    rows = np.union1d(rows, np.array(list(known), dtype=int))
    examples["train"] = Examples(inputs, probabilities).select(rows)
    return examples


def ask_teacher(
    experiment: Experiment, setup: Setup, known: dict[int, int], started: float
) -> Tensor:
    """Log-probabilities (N, L) of all training rows, by a prompt and a bag of words.

    Where labels are known, the prompt learns from them first.
    """
    run, runtime = Run(experiment.run.state_path.parent / "teacher"), setup.runtime
    path, texts = run.directory / "answers.safetensors", setup.reviews.texts["train"]
    key = tuple(known.items())
    if path.is_file():  # the run is resumed
        setup.teachers[key] = load_file(path)["logs"]
    run.state_path.parent.mkdir(parents=True, exist_ok=True)
    if key not in setup.teachers:
        runtime.log(f"the teacher: a prompt that learned from {plural(len(key), 'label')}")
        options = options_of("prompt", setup.args) | {"template": setup.args.template[:1]}
        model = build("prompt", setup.source, setup.reviews.names, setup.attention, **options)
        model.to(runtime.device)
        examples = setup.read(model)
        model.calibrate(choose_unlabelled(examples["train"].inputs, setup.args.seed), runtime)
        if known:
            pupil = Experiment("prompt", len(known), experiment.seed, run)
            few = choose_rows(pupil, setup, examples)
            size = model.bert.config.hidden_size
            recipe = METHODS["prompt"].recipe(setup.args, few["train"], size, setup.source)
            train(model, few, recipe, pupil, setup, started)
        rows, size = examples["train"], reading_tokens(runtime.device)
        logs = logits_of(model, rows, len(setup.reviews.names), size, runtime)
        setup.teachers[key] = both_views(texts, logs, known)
    if runtime.is_main and not path.is_file():
        write_tensors(path, {"logs": setup.teachers[key]}, {})
    return setup.teachers[key]
