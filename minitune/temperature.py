"""Temperature scaling: probabilities that can be taken at their word.

Of all answers to which a classifier gives 90%, nine in ten should be right. A fine-tuned network is
surer than that as a rule. One number T, the temperature, corrects it: softmax(logits / T). T above
1 makes every answer less sure, T below 1 surer. No order of logits changes, so no label does. T is
fitted on the validation rows, by their loss (Guo et al. 2017, "On Calibration of Modern Neural
Networks"), and saved with the model.

Shapes: N texts, L labels.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.batching import sorted_batches
from minitune.classification import Examples
from minitune.support.results import macro_f1
from minitune.support.runs import write_atomically
from minitune.support.runtime import Runtime

HIGHEST = 20.0  # the highest temperature that is tried; the lowest is 1 / HIGHEST


@torch.no_grad()
def logits_of(
    model: nn.Module, examples: Examples, num_labels: int, batch_tokens: int, runtime: Runtime
) -> Tensor:
    """Logits (N, L), float32, in the order of the examples; processes share the batches."""
    model.eval()
    logits = torch.zeros(len(examples), num_labels)
    batches = sorted_batches(examples.inputs.lengths, batch_tokens)
    mine = batches[runtime.rank :: runtime.world_size]
    with runtime.autocast():  # one context, so that it casts weights only once
        for rows in runtime.progress(mine, desc="answers", leave=False):
            inputs, _ = examples.select(rows).to(runtime.device)
            logits[torch.from_numpy(rows)] = model(*inputs).float().cpu()
    return runtime.sum(logits)  # zeros where another process had the row


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T for which softmax(logits / T) has the smallest mean loss; logits (N, L), labels (N,).

    As a function of 1 / T the loss is convex, so its minimum is where its slope is zero. Where all
    rows are right, there is none: the loss falls as long as T does. Where more are wrong than by
    chance, it falls as long as T rises. T stays 1 then, and wherever the minimum is not between
    1 / HIGHEST and HIGHEST: such rows do not show how sure the model may be.
    """
    logits = logits.double()
    right = logits.gather(1, labels[:, None]).squeeze(1)

    def slope(log_beta: float) -> float:
        """Of the loss, by beta = 1 / T."""
        expected = (logits * (math.exp(log_beta) * logits).softmax(-1)).sum(-1)
        return (expected - right).mean().item()

    low, high = -math.log(HIGHEST), math.log(HIGHEST)
    if not slope(low) < 0 < slope(high):
        return 1.0
    for _ in range(60):  # bisection, until float64 has no number between
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp(-low)


def is_temperature(value: object) -> bool:
    """Whether a saved value can be one: a positive number, for which float32 has room."""
    return type(value) in (int, float) and 0 < value < 1e38


def score(logits: Tensor, labels: Tensor) -> dict:
    """`loss` in nats, `accuracy` and `macro_f1` of logits (N, L), given the labels (N,)."""
    answers = logits.argmax(-1)
    return {
        "loss": F.cross_entropy(logits.double(), labels).item(),
        "accuracy": (answers == labels).double().mean().item(),
        "macro_f1": macro_f1(labels.tolist(), answers.tolist()),
    }


def save_answers(
    path: Path, answers: dict[str, tuple[Tensor, Tensor]], names: dict[int, str], temperature: float
) -> None:
    """Write (logits, labels) of each split as JSON, from which all figures can be recomputed."""
    content = {"names": list(names.values()), "temperature": temperature}
    for split, (logits, labels) in answers.items():
        rows = [[round(value, 6) for value in row] for row in logits.tolist()]
        content[split] = {"labels": labels.tolist(), "logits": rows}
    write_atomically(path, json.dumps(content).encode())
