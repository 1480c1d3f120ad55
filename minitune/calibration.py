"""Calibrating a prompt without labels: what the answer would be for no reason at all, taken off again.

A model that writes "good" into most blanks calls everything positive. Its label scores still put
the reviews in order; what is wrong is where zero lies. Each function here gives one number a label
to add to the scores, which are log-probabilities. Accuracy moves by ten points and more with it;
that is the lesson.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.prediction import BLOCK, Prediction
from minitune.prompting import Prompt, in_words
from minitune.support.results import TOGETHER, expected_calibration_error, interval


def none(prompt: Prompt, unlabelled: Sequence[list[int]]) -> Tensor:
    """The scores as they are."""
    return torch.zeros(len(prompt.words.names))


def contextual(prompt: Prompt, unlabelled: Sequence[list[int]]) -> Tensor:
    """Divide by the probabilities that texts without content get, averaged over three such texts.

    Zhao et al. 2021, "Calibrate Before Use: Improving Few-Shot Performance of Language Models".
    """
    tokenizer = prompt.reader.tokenizer
    content_free = [*tokenizer.encode(["N/A", ""]), [tokenizer.mask_id]]  # the three of the paper
    return -prompt.scores(content_free).softmax(-1).mean(0).log()


def pmi(prompt: Prompt, unlabelled: Sequence[list[int]]) -> Tensor:
    """Divide by how probable the words are in the domain anyway: in the template without any text.

    Domain-conditional pointwise mutual information, log p(word | text, template) - log p(word |
    template): Holtzman et al. 2021, "Surface Form Competition".
    """
    return -prompt.scores([[]])[0]


def prior(prompt: Prompt, unlabelled: Sequence[list[int]]) -> Tensor:
    """Make the mean answer to unlabelled reviews the one that is expected: every label equally often."""
    return match_prior(prompt.scores(unlabelled))


def match_prior(scores: Tensor) -> Tensor:
    """(L,) to add to the scores (N, L), so that the mean of their softmax is the same for all labels.

    The re-estimation of Saerens et al. 2002, "Adjusting the Outputs of a Classifier to New a Priori
    Probabilities", turned round: there the prior is unknown, here it is known and the scores are
    off.
    """
    bias = torch.zeros(scores.size(1), dtype=torch.float64)
    for _ in range(1000):  # a hundred are enough unless hardly any review is in doubt
        step = (scores.double() + bias).log_softmax(-1).logsumexp(0)
        step -= step.mean()
        bias -= step
        if step.abs().max() < 1e-6:
            break
    return bias.float()


CALIBRATIONS: dict[str, Callable[[Prompt, Sequence[list[int]]], Tensor]] = {
    "none": none, "contextual": contextual, "pmi": pmi, "prior": prior,
}  # fmt: skip


class Ensemble:
    """Several prompts, each calibrated, that answer together: the mean of their log-probabilities."""

    def __init__(self, prompts: list[Prompt], calibration: str, unlabelled: Sequence[list[int]]):
        """`calibration` is a key of CALIBRATIONS."""
        self.prompts = prompts
        self.names = prompts[0].words.names  # of the labels
        self.biases = [CALIBRATIONS[calibration](prompt, unlabelled) for prompt in prompts]

    def log_probabilities(self, texts: Sequence[list[int]]) -> Tensor:
        """(N, L) of the labels of these texts."""
        pairs = zip(self.prompts, self.biases, strict=True)
        return agree([prompt.scores(texts) + bias for prompt, bias in pairs])

    def predict(self, texts: Iterable[str], count: int) -> Iterator["PromptPrediction"]:
        """One prediction a text, in the order of the texts, with `count` of the words wanted at the mask.

        Read and answered a block at a time. The words are those in the blank of the first template.
        """
        first, texts = self.prompts[0], iter(texts)
        room = min(prompt.room for prompt in self.prompts)
        while block := list(itertools.islice(texts, BLOCK)):
            ids = first.reader.tokenizer.encode(block)
            probabilities = self.log_probabilities(ids).exp().tolist()
            wanted = first.wanted(ids, count)
            for text, own, p, words in zip(block, ids, probabilities, wanted, strict=True):
                by_name = {name: p[i] for i, name in self.names.items()}
                label = max(by_name, key=by_name.__getitem__)
                yield PromptPrediction(text, label, by_name, len(own) > room, dict(words))


@dataclass
class PromptPrediction(Prediction):
    """The answer for one text, and what the model would have liked to write."""

    words: dict[str, float]  # with their probabilities, the most probable first

    def cells(self) -> dict[str, str]:
        """Also the words."""
        *rest, text = super().cells().items()
        return dict([*rest, ("words", in_words(self.words.items())), text])


def agree(scores: list[Tensor]) -> Tensor:
    """The common answer (N, L) of several prompts with these scores (N, L), in log-probabilities."""
    return torch.stack([own.log_softmax(-1) for own in scores]).mean(0).log_softmax(-1)


def compare_prompts(
    prompts: list[Prompt], texts: list[list[int]], labels: Tensor, unlabelled: list[list[int]]
) -> Iterator[dict]:
    """A row for each template and calibration, and last, for each calibration, one for all templates."""
    names = prompts[0].words.names
    calibrated: dict[str, list[Tensor]] = {name: [] for name in CALIBRATIONS}
    for prompt in prompts:
        scores = prompt.scores(texts)
        for name, calibrate in CALIBRATIONS.items():
            own = scores + calibrate(prompt, unlabelled)
            calibrated[name].append(own)
            yield {"template": prompt.sentence, "calibration": name} | figures(own, labels, names)
    if len(prompts) > 1:
        for name, own in calibrated.items():
            yield {"template": TOGETHER, "calibration": name} | figures(agree(own), labels, names)


def figures(scores: Tensor, labels: Tensor, names: dict[int, str]) -> dict:
    """What scores (N, L) are worth, given the right labels (N,)."""
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
