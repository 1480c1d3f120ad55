"""Calibration of a prompt, without labels: correct its preference for one label.

A model that likes to write "good" into blanks calls every review positive. Its scores may still put
the reviews in the right order, from negative to positive; only the threshold between the labels is
wrong. A calibration is one number for each label, which is added to the scores (log-probabilities)
of every text. The calibrations here differ in how they measure the preference:

    contextual   from the answers to texts without content, such as "N/A" (Zhao et al. 2021)
    pmi          from the answer to the template without any text (Holtzman et al. 2021)
    prior        from the mean answer to unlabelled reviews, which labels should share equally

The last needs a few hundred reviews, and knowledge of how frequent the labels are among them; here
they are assumed to be equally frequent. Accuracy can change by ten points and more.

Shapes: N texts, L labels.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minitune.prompting import Prompt, in_words
from minitune.support.answers import Prediction
from minitune.support.errors import UserError
from minitune.support.results import TOGETHER, expected_calibration_error, interval


def none(prompt: Prompt, unlabelled: Sequence[list[int]]) -> Tensor:
    """The scores as they are."""
    return torch.zeros(len(prompt.verbalizer.names))


def contextual(prompt: Prompt, unlabelled: Sequence[list[int]]) -> Tensor:
    """Divide by the mean probabilities of three texts without content.

    Zhao et al. 2021, "Calibrate Before Use: Improving Few-Shot Performance of Language Models".
    """
    tokenizer = prompt.fill_mask.tokenizer
    content_free = [*tokenizer.encode(["N/A", ""]), [tokenizer.mask_id]]  # the three of the paper
    return -prompt.scores(content_free).softmax(-1).mean(0).log()


def pmi(prompt: Prompt, unlabelled: Sequence[list[int]]) -> Tensor:
    """Divide by how probable the words are in the template without a text.

    Domain-conditional pointwise mutual information, log p(word | text, template) - log p(word |
    template): Holtzman et al. 2021, "Surface Form Competition".
    """
    return -prompt.scores([[]])[0]


def prior(prompt: Prompt, unlabelled: Sequence[list[int]]) -> Tensor:
    """Make the mean answer to unlabelled reviews the same for all labels; UserError for none."""
    if not unlabelled:
        raise UserError("--calibrate prior: there are no train rows to read")
    return match_prior(prompt.scores(unlabelled))


def match_prior(scores: Tensor) -> Tensor:
    """(L,) to add to scores (N, L), so that all labels have the same mean of the softmax over N.

    Saerens et al. 2002, "Adjusting the Outputs of a Classifier to New a Priori Probabilities",
    estimate an unknown prior by iteration. Here the prior is known, and the same iteration with the
    opposite sign corrects the scores.
    """
    bias = torch.zeros(scores.size(1), dtype=torch.float64)
    for _ in range(1000):  # about a hundred suffice, more if nearly all answers are certain
        log_total = (scores.double() + bias).log_softmax(-1).logsumexp(0)  # of each label
        step = log_total - log_total.mean()  # how far each label is above the others
        bias -= step
        if step.abs().max() < 1e-6:
            break
    return bias.float()


def draw_unlabelled(count: int, texts: int, seed: int) -> np.ndarray:
    """Which of so many texts the prior is matched on: `count` indices, drawn at random."""
    return np.random.default_rng(seed).permutation(texts)[:count]


Calibration = Callable[[Prompt, Sequence[list[int]]], Tensor]
CALIBRATIONS: dict[str, Calibration] = {
    "none": none,
    "contextual": contextual,
    "pmi": pmi,
    "prior": prior,
}


def mean_log_probabilities(scores: Sequence[Tensor]) -> Tensor:
    """The joint answer of several prompts with these scores, all (N, L), as log-probabilities."""
    return torch.stack([each.log_softmax(-1) for each in scores]).mean(0).log_softmax(-1)


@dataclass
class PromptPrediction(Prediction):
    """The answer for one text, and the most probable words for the blank."""

    words: dict[str, float]  # word -> probability, the most probable first

    def cells(self) -> dict[str, str]:
        """The columns of a Prediction, and the words before the text."""
        *rest, text = super().cells().items()
        return dict([*rest, ("words", in_words(list(self.words.items()))), text])


class Ensemble:
    """Several calibrated prompts that answer together: the mean of their log-probabilities."""

    def __init__(self, prompts: list[Prompt], calibration: str, unlabelled: list[list[int]]):
        """`calibration` is a key of CALIBRATIONS; `unlabelled` are token ids of texts."""
        self.prompts = prompts
        self.names = prompts[0].verbalizer.names  # of the labels
        self.biases = [CALIBRATIONS[calibration](prompt, unlabelled) for prompt in prompts]

    def log_probabilities(self, texts: list[list[int]]) -> Tensor:
        """(N, L) of the labels of these texts."""
        pairs = zip(self.prompts, self.biases, strict=True)
        return mean_log_probabilities([prompt.scores(texts) + bias for prompt, bias in pairs])

    def predict(self, texts: list[str], count: int) -> list[PromptPrediction]:
        """One prediction for each text, in their order.

        With each come the `count` most probable words for the blank of the first template.
        """
        first, room = self.prompts[0], min(prompt.room for prompt in self.prompts)
        ids = first.fill_mask.tokenizer.encode(texts)
        probabilities = self.log_probabilities(ids).exp().tolist()
        words, answers = first.most_probable_words(ids, count), []
        for text, tokens, row, likely in zip(texts, ids, probabilities, words, strict=True):
            by_name = dict(zip(self.names.values(), row, strict=True))
            label, truncated = max(by_name, key=by_name.get), len(tokens) > room
            answers.append(PromptPrediction(text, label, by_name, truncated, dict(likely)))
        return answers


def compare_prompts(
    prompts: list[Prompt], texts: list[list[int]], labels: Tensor, unlabelled: list[list[int]]
) -> Iterator[dict]:
    """A row for each template with each calibration, and last one for all templates together."""
    names = prompts[0].verbalizer.names
    calibrated: dict[str, list[Tensor]] = {name: [] for name in CALIBRATIONS}
    for prompt in prompts:
        scores = prompt.scores(texts)
        for name, calibrate in CALIBRATIONS.items():
            calibrated[name].append(scores + calibrate(prompt, unlabelled))
            row = {"template": prompt.sentence, "calibration": name}
            yield row | figures(calibrated[name][-1], labels, names)
    if len(prompts) > 1:
        for name, several in calibrated.items():
            row = {"template": TOGETHER, "calibration": name}
            yield row | figures(mean_log_probabilities(several), labels, names)


def figures(scores: Tensor, labels: Tensor, names: dict[int, str]) -> dict:
    """Accuracy, preference and calibration error of scores (N, L), given the right labels (N,)."""
    probabilities = scores.softmax(-1)
    answers = probabilities.argmax(-1)
    accuracy = (answers == labels).double().mean().item()
    most, count = Counter(answers.tolist()).most_common(1)[0]
    return {
        "accuracy": accuracy,
        "interval": interval(accuracy, len(labels)),
        "majority_answer": names[most],
        "majority_share": count / len(labels),
        "calibration_error": expected_calibration_error(probabilities, labels),
    }
