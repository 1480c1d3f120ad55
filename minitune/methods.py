"""The methods of fine-tuning: what each trains, at which rate, and how its model is built.

A method is a row of METHODS and a function that names its trained parameters. All else follows
from the row: training (finetuning.py), saving what was trained and loading it again, the table and
the picture. A layer, and what trains where (`full` and `scratch`: all of it; `feature`: nothing):

    q, k, v = linear(x)                 lora: A B beside each    ia3: k and v times vectors
    a = linear(attention(q, k, v))      lora                     adapter: a bottleneck behind it
    x = LayerNorm(x + a)                                         adapter
    u = gelu(linear(x))                 lora                     ia3: u times a vector
    f = linear(u)                       lora                     adapter: a bottleneck behind it
    x = LayerNorm(x + f)                                         adapter

`bitfit` trains the bias of each linear map and of each LayerNorm. `prompt` has no classifier but
the head of pretraining, and trains all, or with --train what another method does.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitune.adapters import adapter_parameters, insert_adapters, parameters_of
from minitune.checkpoint import load_for_classification, load_tokenizer, load_with_head
from minitune.classification import Examples
from minitune.cloze import CLOZE_LEN, ClozeClassifier
from minitune.features import FeatureClassifier
from minitune.ia3 import ia3_parameters, insert_ia3
from minitune.lora import insert_lora, lora_parameters
from minitune.model import Bert, BertConfig, BertForSequenceClassification
from minitune.prompting import Template, Verbalizer, match_labels, read_words
from minitune.support.cli import choose_max_len
from minitune.support.errors import UserError
from minitune.support.model_names import began_at_random
from minitune.support.options import finetune_options
from minitune.trained import Trained

MOST_TOKENS = 4096  # in a batch
LEAST_BATCHES = 8  # in an epoch
LEAST_STEPS, MOST_EPOCHS = 400, 20  # in a training


@dataclass(frozen=True)
class Method:
    """What a method trains and how. The numbers are from validation rows (benchmarks/LOG.md)."""

    summary: str
    trained: Callable[[nn.Module], list[str]]  # the names of the parameters that train
    lr: Callable[[int], float]  # peak learning rate, for a hidden size
    epochs: int = 1  # where training rows are many
    batch_rows: int = 32  # texts in a batch on average, where training rows are many
    optimizer: str = "adamw"  # "muon": for the matrices of the layers, and AdamW for the rest
    adamw: float = 1.0  # the peak rate of AdamW beside Muon, in multiples of lr
    lowest_layer: float = 1.0  # the rate of the lowest layer, in multiples of the highest's
    # Hidden states to one vector: a key of model.POOLERS, or "layers". "cls" has BERT's pooler,
    # which some pretrained models lack; a method that does not train it needs "mean". Peft's
    # directories know "cls" only. "cloze": the hidden state at the blank of a template.
    pooling: str = "cls"
    insert: Callable[..., None] = lambda bert: None  # puts new modules into the encoder
    options: tuple[str, ...] = ()  # of the command line, that `insert` takes
    pretrained: bool = True  # False: all weights start at random
    trains_words: bool = False  # the word vectors too
    least_batches: int = LEAST_BATCHES  # where training rows are few
    most_epochs: int = MOST_EPOCHS
    full_rate_rows: int = 0  # with fewer training rows the rates are lower, by their square root

    def recipe(self, args: argparse.Namespace, train: Examples, size: int, source: Path) -> dict:
        """The numbers of a training: those in `args`, else what suits these training rows.

        `size` is the model's hidden size, `source` the directory of its pretrained weights.
        """
        # With a cloze the rates are those of the method that --train names.
        part = METHODS[args.train] if self.pooling == ClozeClassifier.pooling else self
        rows = max(1, min(self.batch_rows, len(train) // self.least_batches))
        longest, mean = int(train.inputs.lengths.max()), train.tokens / len(train)
        batch_tokens = max(min(round(rows * mean), MOST_TOKENS), longest)
        if args.batch_tokens and train.inputs.unit == "tokens":  # features are counted by the text
            batch_tokens = args.batch_tokens
        steps = -(-train.tokens // batch_tokens)  # in an epoch
        epochs = args.epochs or max(self.epochs, min(-(-LEAST_STEPS // steps), self.most_epochs))
        share = min(1.0, len(train) / max(self.full_rate_rows, 1)) ** 0.5
        lr = args.lr or share * part.lr(size)
        # A word's vector moves only at steps that read the word. After a random start and a short
        # pretraining it is far from its place, and gets a larger rate.
        far = began_at_random(source) or not self.pretrained
        embeddings = 5.0 if self.trains_words and far else 1.0
        rates = {"embeddings": embeddings, "lowest_layer": part.lowest_layer}
        recipe = {"optimizer": part.optimizer, "epochs": epochs, "batch_tokens": batch_tokens}
        return recipe | {"lr": lr, "adamw_lr": part.adamw * lr, "lr_multipliers": rates}


def describe_recipe(recipe: dict, unit: str) -> str:
    """The numbers of a training; `unit` is that of a batch's size."""
    words = "{epochs} epochs, at most {batch_tokens:,} {unit} a step, {optimizer} at {lr:.2g}"
    words = words.format(unit=unit, **recipe).replace("1 epochs,", "1 epoch,")
    if recipe["optimizer"] == "muon":
        words += f", adamw at {recipe['adamw_lr']:.2g} for the rest"
    for part, multiplier in recipe["lr_multipliers"].items():
        if multiplier != 1:
            words += f", {part.replace('_', ' ')} at {multiplier:.2g} times that"
    return words


def all_parameters(model: nn.Module) -> list[str]:
    """The names of all parameters."""
    return [name for name, _ in model.named_parameters()]


def biases_and_classifier(model: nn.Module) -> list[str]:
    """The names of all biases, and of the classifier's weight (Ben Zaken et al. 2022, "BitFit")."""
    names = all_parameters(model)
    return [name for name in names if name == "classifier.weight" or name.endswith(".bias")]


def for_all_parameters(hidden_size: int) -> float:
    """A peak learning rate: 3e-4 for a hidden size of 256, 1.4e-4 for 384, and 3.4e-5 for 768.

    The last is among those recommended for BERT-base (Devlin et al. 2019, appendix A.3).
    """
    return 20 / hidden_size**2


METHODS = {
    "feature": Method(
        "the encoder is frozen and reads each text once; a linear classifier learns from features",
        trained=lambda model: parameters_of(model, ["head"]), pooling="layers",
        lr=lambda _: 3e-4, epochs=20, batch_rows=256,
    ),
    "bitfit": Method(
        "the biases of the frozen encoder, those of its LayerNorms too, and the classifier",
        trained=biases_and_classifier, pooling="mean",
        lr=lambda _: 3e-3,
    ),
    "ia3": Method(
        "vectors that multiply keys, values and units of the frozen encoder, pooler and classifier",
        trained=ia3_parameters, insert=insert_ia3,
        lr=lambda _: 1e-2,
    ),
    "lora": Method(
        "low-rank matrices beside those of the frozen encoder, the pooler and the classifier",
        trained=lora_parameters, insert=insert_lora,
        options=("lora_targets", "lora_rank", "lora_alpha", "lora_dropout", "rslora", "dora"),
        lr=lambda size: 10 * for_all_parameters(size),
    ),
    "adapter": Method(
        "bottlenecks inside the frozen encoder, the LayerNorms of its layers, and the classifier",
        # In a frozen network [CLS] gathers little, since masked-language modelling does not need
        # it; and BERT's pooler would be a fifth of all that a small model trains.
        trained=adapter_parameters, pooling="mean",
        insert=insert_adapters, options=("adapter_size",),
        lr=lambda _: 1e-2, optimizer="muon", adamw=0.2,
    ),
    "full": Method(
        "all parameters",
        trained=all_parameters, trains_words=True,
        # That is 0.7 from layer to layer in a network of four, 0.8 in one of six.
        lr=for_all_parameters, lowest_layer=1 / 3,
    ),
    "scratch": Method(
        "all parameters, from random weights: what pretraining was worth",
        trained=all_parameters, trains_words=True, pretrained=False,
        lr=for_all_parameters,
    ),
    "prompt": Method(
        "the pretrained head fills the blank of a cloze, and learns to fill it with a label's word",
        trained=all_parameters, pooling="cloze",
        options=("train", "template", "words", "cloze_len"),
        # Large steps on few rows forget what the prompt knew. The rates are those of what trains.
        lr=for_all_parameters, full_rate_rows=8192,
        batch_rows=16, least_batches=1, most_epochs=6,
    ),
}  # fmt: skip


# What trains in a run of `prompt` whose weights were all trained: they are its own base.
NOTHING = Method("nothing", trained=lambda model: [], lr=lambda _: 0.0)


def options_of(method: str, args: argparse.Namespace) -> dict:
    """The options of a method, by their names; for `prompt` also those of what --train names."""
    names = METHODS[method].options
    options = {name: getattr(args, name) for name in names}
    if "train" in names:
        options |= options_of(args.train, args)
    return options


def build(
    method: str,
    source: Path,
    labels: dict[int, str],
    attention: str = "sdpa",
    *,
    saved_pooling: str | None = None,
    **options: Any,
) -> BertForSequenceClassification | FeatureClassifier:
    """The model of a method on the pretrained weights in `source`; what does not train is frozen.

    `options` are those of the method. `saved_pooling` is for a saved model, which may have another
    pooling than the method has today; what is new then takes no memory ("meta") until it is filled.
    """
    row = METHODS[method]
    pooling = saved_pooling or row.pooling
    reads_layers = pooling == FeatureClassifier.pooling
    if pooling == ClozeClassifier.pooling:
        row = METHODS[part] if (part := options.pop("train")) else NOTHING
        cloze = {name: options.pop(name) for name in ("template", "words", "cloze_len")}
        model, new = build_cloze(source, labels, attention, **cloze), []
    else:
        pooler = "cls" if reads_layers else pooling
        model, new = load_for_classification(source, labels, attention, pooler, row.pretrained)
    pretrained = set(all_parameters(model)) - set(new)
    with torch.device("meta" if saved_pooling else "cpu"):
        if reads_layers:
            model = FeatureClassifier(model.bert, len(labels))
        row.insert(model.bert, **options)
    trained = set(row.trained(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        if name not in trained | pretrained:
            hint = "train it, or choose a pooling without weights, 'mean'"
            raise ValueError(f"{method}: {name} is neither pretrained nor trained: {hint}")
    return model


def build_cloze(
    source: Path,
    labels: dict[int, str],
    attention: str,
    template: list[str],
    words: list[str],
    cloze_len: int | None,
) -> ClozeClassifier:
    """The masked language model in `source` with templates, and `words` as --words has them.

    Raises UserError where it has no head, a label has no words, or a cloze does not fit.
    """
    model = load_with_head(source, "--method prompt", attention)
    tokenizer, listed = load_tokenizer(source, model.config), read_words(words)
    chosen = match_labels(labels, dict(enumerate(listed)), "--method prompt")
    several = list(listed.values())
    of_labels = {name: several[i] for name, i in zip(labels.values(), chosen, strict=True)}
    positions = model.config.max_position_embeddings
    max_len = choose_max_len(cloze_len, positions, default=CLOZE_LEN, option="--cloze-len")
    templates = [Template(sentence, tokenizer) for sentence in template]
    return ClozeClassifier(model, tokenizer, templates, Verbalizer(of_labels, tokenizer), max_len)


def load_trained(
    saved: Trained, directory: Path, source: Path, attention: str
) -> BertForSequenceClassification | FeatureClassifier:
    """The model of a run that saved what it trained, on the pretrained weights in `source`."""
    how = {"saved_pooling": saved.pooling, **saved.options}
    try:
        if saved.pooling == ClozeClassifier.pooling:
            how["cloze_len"] = saved.max_len
            if not isinstance(how["template"], list) or not isinstance(how["words"], list):
                raise ValueError("templates and words are lists")
        model = build(saved.method, source, saved.labels, attention, **how)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory}/{saved.file} is damaged: {error!r}") from error
    saved.fill(model, directory)
    model.temperature = saved.temperature
    return model


def check_options(method: str, config: BertConfig, args: argparse.Namespace) -> None:
    """Raise UserError where the options of a method do not suit the sizes of a model."""
    if METHODS[method].pooling == ClozeClassifier.pooling:
        method = args.train
    with torch.device("meta"):  # without memory
        METHODS[method].insert(Bert(config), **options_of(method, args))


def keep_options(saved: Trained, directory: Path, args: argparse.Namespace) -> None:
    """Give `args` the options of a run that is trained on: its modules have the sizes they have.

    Raises UserError where `args` asks for others; a default asks for nothing.
    """
    defaults = vars(finetune_options().parse_args([]))
    for name in defaults.keys() & {*METHODS[saved.method].options, *saved.options}:
        value, default = getattr(args, name), defaults[name]
        has = saved.options.get(name, default)
        if value not in (has, default):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {value}: the run in {directory} has {has}")
        setattr(args, name, has)
