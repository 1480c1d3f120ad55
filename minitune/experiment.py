"""What a fine-tuning needs: a pretrained model, labelled texts, a method, and the rows to read."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from minitune.calibration import draw_unlabelled
from minitune.classification import Examples, TokenizedTexts
from minitune.cloze import UNLABELLED, ClozeClassifier
from minitune.data import SPLITS, Reviews
from minitune.methods import build, load_trained, options_of
from minitune.model import MaskedLMHead
from minitune.support.model_names import find_model
from minitune.support.runs import Run
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer
from minitune.trained import Trained


@dataclass
class Setup:
    """What all experiments of a command share."""

    args: argparse.Namespace
    settings: dict  # for settings.json
    source: Path  # the directory of the pretrained model
    start: Trained | None  # the run that args.model names, if it is to be trained on
    tokenizer: Tokenizer
    reviews: Reviews
    examples: dict[str, Examples]  # by split
    runtime: Runtime
    attention: str  # the backend
    ends: dict[str, Examples] = field(default_factory=dict)  # `examples` as a cloze has them
    prompted: Tensor | None = None  # (N, L), what a prompt answers for the training rows
    # (N, L) each, what the teacher answers for the training rows, by the labels that are known.
    teachers: dict[tuple, Tensor] = field(default_factory=dict)
    test_features: Tensor | None = None  # (N, F)
    offsets: Tensor | None = None  # of a cloze's templates, the same for all experiments
    head: MaskedLMHead | None = None  # with --masked-words

    def options(self, method: str) -> dict:
        """The options of a method."""
        return options_of(method, self.args)

    def build(self, method: str) -> nn.Module:
        """The model of a method, on the device, before training."""
        if self.start:
            directory = find_model(self.args.model)
            model = load_trained(self.start, directory, self.source, self.attention)
        else:
            options = self.options(method)
            model = build(method, self.source, self.reviews.names, self.attention, **options)
        self.runtime.cast_frozen(model.bert)
        return model.to(self.runtime.device)

    def read(self, model: ClozeClassifier) -> dict[str, Examples]:
        """The rows of each split as this model reads them: the ends of the texts."""
        if not self.ends:
            how = self.tokenizer, model.max_len, model.beginning
            for split in SPLITS:
                texts = TokenizedTexts(self.reviews.texts[split], *how)
                self.ends[split] = Examples(texts, self.reviews.labels[split])
            cut = sum(self.ends["train"].inputs.truncated) / len(self.ends["train"])
            words = f"{cut:.0%} of the training rows have over {model.max_len} tokens"
            self.runtime.log(f"as a cloze {words}; their end is kept")
        return self.ends

    def calibrate(self, model: ClozeClassifier) -> None:
        """Give the model its offsets, from training rows without a look at their labels."""
        if self.offsets is None:
            chosen = choose_unlabelled(self.read(model)["train"].inputs, self.args.seed)
            model.calibrate(chosen, self.runtime)
            self.offsets = model.offsets.clone()
        model.offsets.copy_(self.offsets)


@dataclass
class Experiment:
    """One method on one choice of training rows, and the directory of its run."""

    method: str
    train_examples: int | None  # None: all
    seed: int
    run: Run

    @property
    def description(self) -> dict:
        """What tells it from others, for settings.json."""
        return {key: value for key, value in vars(self).items() if key != "run"}


def choose_unlabelled(texts: TokenizedTexts, seed: int) -> TokenizedTexts:
    """Some of these texts, drawn at random: the same as prompt.py draws."""
    return texts.select(draw_unlabelled(UNLABELLED, len(texts.lengths), seed))


def choose_rows(
    experiment: Experiment, setup: Setup, examples: dict[str, Examples]
) -> dict[str, Examples]:
    """The rows of each split.

    With --train-examples N at most N / 2 validation rows choose the epoch, or, with --unlabelled,
    rows without a label (self_training.taught_rows): whoever has few labels to train on has no
    thousand to choose by (Perez et al. 2021, "True Few-Shot Learning with Language Models").
    """
    examples = dict(examples)
    if experiment.train_examples is not None:
        few = {"train": experiment.train_examples, "validation": experiment.train_examples // 2}
        for split, count in few.items():
            count = min(count, len(examples[split]))
            rows = setup.reviews.balanced_subset(split, count, experiment.seed)
            examples[split] = examples[split].select(rows)
    return examples


def known_labels(experiment: Experiment, setup: Setup) -> dict[int, int]:
    """The labels that --train-examples allows to read, by their training rows."""
    rows = setup.reviews.balanced_subset("train", experiment.train_examples, experiment.seed)
    return {int(row): int(setup.reviews.labels["train"][row]) for row in rows}
