"""What each fine-tuning method trains, and the defaults that suit it.

    feature   the encoder is frozen and reads each text once; a linear head learns from what it says
    adapter   small bottlenecks inside the frozen encoder, the LayerNorms of its layers, and the head
    full      everything
    scratch   everything, from random weights: what pretraining was worth

Loop, data and evaluation are the same for all of them. A method is the list of parameters that
`choose_trained` returns, and a row of METHODS.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from minitune.adapters import adapter_modules, insert_adapters
from minitune.checkpoint import load_for_classification, read_config
from minitune.classification import Examples
from minitune.features import FeatureClassifier
from minitune.model import BertForSequenceClassification, MeanPooler
from minitune.optimizer import Rates
from minitune.sources import began_at_random


@dataclass(frozen=True)
class Method:
    """The defaults of a method, chosen on validation rows (tests/benchmarks/LOG.md)."""

    summary: str
    optimizer: str  # for the hidden matrices: "muon", or "adamw" for these and the rest
    lr: Callable[[int], float]  # peak, of that optimizer, for a hidden size
    passes: int  # over the training rows, where these are many
    batch_rows: int  # average texts in a batch, where training rows are many
    adamw: float = 1.0  # peak of AdamW for the rest, beside Muon, in multiples of lr

    def batch_tokens(self, train: Examples) -> int:
        """The token budget of a batch."""
        rows = max(1, min(self.batch_rows, len(train) // LEAST_BATCHES))
        longest, mean = int(train.inputs.lengths.max()), train.tokens / len(train)
        return max(min(round(rows * mean), MOST_TOKENS), longest)

    def epochs(self, train: Examples, batch_tokens: int) -> int:
        """Passes over the training rows: more of them where rows are few, for enough steps."""
        steps = -(-train.tokens // batch_tokens)
        return max(self.passes, min(-(-LEAST_STEPS // steps), MOST_PASSES))


MOST_TOKENS = 4096  # in a batch
LEAST_BATCHES = 8  # in an epoch
LEAST_STEPS, MOST_PASSES = 400, 20  # in a run


def for_all_weights(hidden_size: int) -> float:
    """A wider network wants less: 3e-4 for 256, 1.4e-4 for 384, and for the 768 of BERT-base 3.4e-5, amid
    what its paper recommends (Devlin et al. 2019, appendix A.3)."""
    return 20 / hidden_size**2


def rates(method: str, source: Path) -> Rates:
    """What learns faster and what slower than the rest, measured in tests/benchmarks/LOG.md.

    Word vectors are young in random weights, and in a run of train.py that began with them. Those of real
    weights lost a little by learning faster; where it is not known how a model began, or where --init went on
    from another, they count as settled.
    """
    young = method == "scratch" or (method == "full" and began_at_random(source))
    # Of random layers none knows more than another. A third: 0.7 a layer in four of them, 0.8 in six.
    return Rates(embeddings=5.0 if young else 1.0, lowest_layer=1 / 3 if method == "full" else 1.0)


def rates_in_words(recipe: Method, lr: float, rates: Rates) -> str:
    """The optimizer and its learning rates, in a line; `lr` is the peak."""
    words = f"{recipe.optimizer} at {lr:.2g}"
    if recipe.optimizer == "muon":
        words += f", adamw at {recipe.adamw * lr:.2g} for the rest"
    if rates.embeddings != 1:
        words += f", {rates.embeddings:g} times that for embeddings"
    if rates.lowest_layer != 1:
        words += f", less for lower layers, down to {rates.lowest_layer:.2g} times that"
    return words


METHODS = {
    "feature": Method(
        summary="the encoder is frozen and reads each text once; a linear head learns from what it says",
        optimizer="adamw", lr=lambda _: 3e-4, passes=20, batch_rows=256,
    ),
    "adapter": Method(
        summary="bottlenecks inside the frozen encoder, the LayerNorms of its layers, and the head",
        optimizer="muon", lr=lambda _: 1e-2, adamw=0.2, passes=1, batch_rows=32,
    ),
    "full": Method(
        summary="everything",
        optimizer="adamw", lr=for_all_weights, passes=1, batch_rows=32,
    ),
    "scratch": Method(
        summary="everything, from random weights: what pretraining was worth",
        optimizer="adamw", lr=for_all_weights, passes=1, batch_rows=32,
    ),
}  # fmt: skip


def build(
    method: str, source: Path, labels: dict[int, str], adapter_size: int, attention: str
) -> BertForSequenceClassification | FeatureClassifier:
    """The pretrained model of a directory, ready for a method; what does not train is frozen."""
    if method == "scratch":
        model = BertForSequenceClassification(replace(read_config(source), id2label=labels), attention)
    else:
        model = load_for_classification(source, labels, attention)
    if method == "feature":
        model = FeatureClassifier(model.bert, len(labels))
    elif method == "adapter":
        insert_adapters(model.bert, adapter_size)
        # In a frozen network [CLS] gathers little, since masked-language modelling asks nothing of it;
        # and BERT's pooler would be a fifth of all that a small model trains.
        model.pooler = MeanPooler()
    chosen = set(choose_trained(model, method))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return model


def choose_trained(model: nn.Module, method: str) -> list[str]:
    """The names of the parameters that train."""
    if method == "feature":
        return [f"head.{name}" for name, _ in model.head.named_parameters()]
    if method == "adapter":
        return [
            f"{path}.{name}"
            for path, module in adapter_modules(model).items()
            for name, _ in module.named_parameters()
        ]
    return [name for name, _ in model.named_parameters()]


def summary(names: Iterable[str]) -> str:
    """Parameter names in a line: those of all layers as one, weight and bias as one."""
    short = [re.sub(r"\.\d+\.", ".*.", name) for name in names]
    return ", ".join(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in short))
