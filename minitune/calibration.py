"""Calibrating a prompt without labels: what the answer would be for no reason at all, taken off again.

A model that writes "good" into most blanks calls everything positive. Its label scores still put
the reviews in order; what is wrong is where zero lies. Each function here gives one number a label
to add to the scores, which are log-probabilities. Accuracy moves by ten points and more with it;
that is the lesson.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minitune.prompting import Prompt
from minitune.support.results import TOGETHER, expected_calibration_error, interval


def none(prompt: Prompt, unlabelled: Sequence[list[int]]) -> Tensor:
    """The scores as they are."""
    return torch.zeros(len(prompt.words.names))


def contextual(prompt: Prompt, unlabelled: Sequence[list[int]]) -> Tensor:
    """Divide by the probabilities that texts without content get, averaged over three such texts.

    Zhao et al. 2021, "Calibrate Before Use: Improving Few-Shot Performance of Language Models".
    """
    tokenizer = prompt.fill_mask.tokenizer
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


def mean_log_probabilities(scores: list[Tensor]) -> Tensor:
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
            yield {"template": TOGETHER, "calibration": name} | figures(
                mean_log_probabilities(own), labels, names
            )


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
