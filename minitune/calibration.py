"""Calibration of a prompt without labels: take off what the model would answer to any text.

A model that likes to write "good" into blanks calls every review positive. Its scores still put the
reviews in the right order, most negative to most positive; only zero is in the wrong place. Each
calibration here is one number a label, added to the scores (log-probabilities) of every text. They
differ in what they take as the content-free answer:

    contextual   the answer to texts without content, such as "N/A" (Zhao et al. 2021)
    pmi          the answer to the template without any text (Holtzman et al. 2021)
    prior        the mean answer to unlabelled reviews, which should be all labels alike

The last needs a few hundred reviews, and to know how frequent the labels are among them; here they
are taken to be equally frequent. Accuracy can move by ten points and more.

Shapes: N texts, L labels.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minitune.prompting import Prompt
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
    estimate an unknown prior by repeating a step; the same step, backwards, corrects scores where
    the prior is known.
    """
    bias = torch.zeros(scores.size(1), dtype=torch.float64)
    for _ in range(1000):  # a hundred are enough unless hardly any review is in doubt
        mean = (scores.double() + bias).log_softmax(-1).logsumexp(0)
        step = mean - mean.mean()  # how far each label is above the others, in log-probability
        bias -= step
        if step.abs().max() < 1e-6:
            break
    return bias.float()


Calibration = Callable[[Prompt, Sequence[list[int]]], Tensor]
CALIBRATIONS: dict[str, Calibration] = {f.__name__: f for f in (none, contextual, pmi, prior)}


def mean_log_probabilities(scores: Sequence[Tensor]) -> Tensor:
    """The common answer of several prompts with these scores, all (N, L), as log-probabilities."""
    return torch.stack([each.log_softmax(-1) for each in scores]).mean(0).log_softmax(-1)


def compare_prompts(
    prompts: list[Prompt], texts: list[list[int]], labels: Tensor, unlabelled: list[list[int]]
) -> Iterator[dict]:
    """A row for each template with each calibration, and last one for all templates together."""
    names = prompts[0].verbalizer.names
    calibrated: dict[str, list[Tensor]] = {name: [] for name in CALIBRATIONS}
    for prompt in prompts:
        scores = prompt.scores(texts)
        for name, calibrate in CALIBRATIONS.items():
            leveled = scores + calibrate(prompt, unlabelled)
            calibrated[name].append(leveled)
            row = {"template": prompt.sentence, "calibration": name}
            yield row | figures(leveled, labels, names)
    for name, several in calibrated.items() if len(prompts) > 1 else ():
        row = {"template": TOGETHER, "calibration": name}
        yield row | figures(mean_log_probabilities(several), labels, names)


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
