"""A model on disk: a directory in the layout and under the tensor names of a Hugging Face BERT.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  vocab.txt

What is written here loads in `transformers`, and a BERT written there loads here. Weights are read
and written as safetensors only; a pickle can run code when it is opened. Files may be anybody's:
shapes are compared with the header of the weights before memory is taken for a model.
"""

import hashlib
import math
import reprlib
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minitune.model import POOLERS, BertConfig, BertForMaskedLM, BertForSequenceClassification
from minitune.support.config_file import FIXED, read_config_file
from minitune.support.errors import UserError
from minitune.support.runs import read_json, write_atomically, write_json, write_tensors
from minitune.support.tensor_file import TensorFile
from minitune.temperature import is_temperature
from minitune.tokenizer import Tokenizer

# What parts of our names are called in BERT checkpoints.
NAMES = {
    "bert.embeddings.word.": "bert.embeddings.word_embeddings.",
    "bert.embeddings.position.": "bert.embeddings.position_embeddings.",
    "bert.embeddings.token_type.": "bert.embeddings.token_type_embeddings.",
    "bert.embeddings.norm.": "bert.embeddings.LayerNorm.",
    "bert.layers.": "bert.encoder.layer.",
    ".attention.out.": ".attention.output.dense.",
    ".attention_norm.": ".attention.output.LayerNorm.",
    ".feed_forward.up.": ".intermediate.dense.",
    ".feed_forward.down.": ".output.dense.",
    ".feed_forward_norm.": ".output.LayerNorm.",
    "pooler.": "bert.pooler.",
    "head.dense.": "cls.predictions.transform.dense.",
    "head.norm.": "cls.predictions.transform.LayerNorm.",
    "head.bias": "cls.predictions.bias",
}


def bert_names(name: str) -> list[str]:
    """The checkpoint's name for one of our tensors; three names for a fused query-key-value."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    if ".qkv." in name:
        return [name.replace(".qkv.", f".self.{part}.") for part in ("query", "key", "value")]
    return [name]


def to_bert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under BERT's names, query, key and value apart. The tensors share memory."""
    renamed = {}
    for name, tensor in tensors.items():
        names = bert_names(name)
        renamed |= zip(names, tensor.detach().chunk(len(names)), strict=True)
    return renamed


def current_name(name: str) -> str:
    """The current name of a tensor that an older file calls otherwise."""
    if not name.startswith(("bert.", "cls.", "classifier.")):
        name = f"bert.{name}"  # a bare BertModel
    # The first BERT checkpoints came from TensorFlow, with its names for LayerNorm.
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


def config_json(config: BertConfig, architecture: str) -> dict:
    """What `config.json` says, for us and for `transformers`."""
    values = asdict(config)
    if labels := values.pop("id2label"):
        values |= {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    extra = {"architectures": [architecture], "attention_probs_dropout_prob": 0.0}
    return extra | FIXED | values


def save_model(
    model: BertForMaskedLM | BertForSequenceClassification, tokenizer: Tokenizer, directory: Path
) -> None:
    """Write a directory that loads as the class of the same name in `transformers`."""
    for name, content in tokenizer.files(model.config.max_position_embeddings).items():
        write_atomically(directory / name, content)
    config = config_json(model.config, type(model).__name__)
    if getattr(model, "pooling", "cls") != "cls":  # another one is unknown to `transformers`
        config["pooling"] = model.pooling
    if getattr(model, "temperature", 1.0) != 1.0:  # there "temperature" belongs to generation
        config["softmax_temperature"] = model.temperature
    write_json(directory / "config.json", config)
    write_tensors(directory / "model.safetensors", to_bert(model.state_dict()), {"format": "pt"})


@torch.no_grad()
def load_bert(model: nn.Module, directory: Path, optional: tuple[str, ...] = ()) -> list[str]:
    """Fill `model` with the weights of a BERT directory, and return the names it did not have.

    Only names that begin with one of `optional` may be missing; they keep their initial values.
    Raises UserError where another is missing, one does not fit, or the file cannot be read.
    """
    weights, missing = open_weights(directory), []
    for name, tensor in model.state_dict().items():
        if name.startswith(optional) and bert_names(name)[0] not in weights.names:
            missing.append(name)
            continue
        for bert_name, part in to_bert({name: tensor}).items():
            part.copy_(weights.read(bert_name, tuple(part.shape)))
    return missing


def open_weights(directory: Path) -> TensorFile:
    """The weights of a model directory, under their current names; UserError if there are none."""
    path = weights_file(directory)
    return TensorFile(path, described_in="config.json", rename=current_name)


def weights_file(directory: Path) -> Path:
    """The path of the weights of a model directory; UserError if there are none."""
    path = directory / "model.safetensors"
    if not path.is_file():
        pickled = (directory / "pytorch_model.bin").is_file()
        why = "only a pickled pytorch_model.bin, which is never read" if pickled else "no such file"
        raise UserError(f"{path}: {why}")
    return path


def weights_hash(directory: Path, name: str = "") -> str:
    """SHA-256 of the weights file, which tells one model from another; or of the file `name`."""
    with open(directory / name if name else weights_file(directory), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_config(directory: Path) -> BertConfig:
    """The `config.json` of a BERT directory.

    Raises UserError where it describes another architecture, or not the weights beside it.
    """
    config = BertConfig(**read_config_file(directory / "config.json", asdict(BertConfig())))
    # A matrix of each size is enough here; when a model is filled, every tensor is compared.
    weights, C, embeddings = open_weights(directory), config.hidden_size, "bert.embeddings"
    weights.check(f"{embeddings}.word_embeddings.weight", (config.vocab_size, C))
    weights.check(f"{embeddings}.position_embeddings.weight", (config.max_position_embeddings, C))
    weights.check(f"{embeddings}.token_type_embeddings.weight", (config.type_vocab_size, C))
    for i in range(config.num_hidden_layers):
        layer = f"bert.encoder.layer.{i}"
        weights.check(f"{layer}.attention.output.dense.weight", (C, C))
        weights.check(f"{layer}.intermediate.dense.weight", (config.intermediate_size, C))
    return config


def load_masked_lm(directory: Path, attention: str = "sdpa") -> tuple[BertForMaskedLM, bool]:
    """The model in a BERT directory, and whether it brought a masked-LM head of its own.

    Where it did not, the head is new: its dense layer has BERT's initial weights, its biases are 0.
    """
    model = BertForMaskedLM(read_config(directory), attention)
    missing = load_bert(model, directory, optional=("head.",))
    if 0 < len(missing) < len(model.head.state_dict()):
        raise UserError(f"{directory}: {bert_names(missing[0])[0]} of the head is missing")
    return model.eval(), not missing


def load_with_head(directory: Path, option: str, attention: str = "sdpa") -> BertForMaskedLM:
    """The model in a BERT directory that brought a masked-LM head, which `option` needs.

    Raises UserError where it brought none.
    """
    model, has_head = load_masked_lm(directory, attention)
    if not has_head:
        way_out = "python train.py --init MODEL gives it one"
        raise UserError(f"{option}: {directory} has no masked-LM head; {way_out}")
    return model


def load_for_classification(
    directory: Path,
    labels: dict[int, str],
    attention: str = "sdpa",
    pooling: str = "cls",
    pretrained: bool = True,
) -> tuple[BertForSequenceClassification, list[str]]:
    """A classifier on the encoder in a BERT directory, and the names of its new parameters.

    New are the classifier, and the pooler where the directory has none; all parameters, at random,
    if `pretrained` is False: then only the shape is that of the directory.
    """
    config = replace(read_config(directory), id2label=labels)
    model = BertForSequenceClassification(config, attention, pooling)
    if not pretrained:
        return model, [name for name, _ in model.named_parameters()]
    without_classifier = nn.ModuleDict({"bert": model.bert, "pooler": model.pooler})
    missing = load_bert(without_classifier, directory, optional=("pooler.",))
    return model, ["classifier.weight", "classifier.bias", *missing]


def load_classifier(directory: Path, attention: str = "sdpa") -> BertForSequenceClassification:
    """A fine-tuned classifier with its label names, written here or by `transformers`.

    Raises UserError where it is none, or answers in a way that minitune does not compute.
    """
    config, path = read_config(directory), directory / "config.json"
    if not config.id2label:  # transformers leaves names out where they are LABEL_0, LABEL_1
        weights = open_weights(directory)
        if "classifier.bias" not in weights.names:
            raise UserError(f"{directory} is no classifier: fine-tune it first (finetune.py)")
        count = math.prod(weights.shape("classifier.bias"))
        config.id2label = {i: f"LABEL_{i}" for i in range(count)}
    check_labels(config.id2label, path)
    raw = read_json(path)
    pooling = raw.get("pooling", "cls")
    if pooling not in list(POOLERS):
        raise UserError(f"{path}: there is no pooling {pooling}")
    temperature = raw.get("softmax_temperature", 1.0)
    if not is_temperature(temperature):
        raise UserError(f"{path}: softmax_temperature cannot be {reprlib.repr(temperature)}")
    model = BertForSequenceClassification(config, attention, pooling)
    load_bert(model, directory)
    model.temperature = temperature
    return model.eval()


def check_labels(labels: dict[int, str], path: Path) -> None:
    """Raise UserError unless a classifier can have these labels, of the `config.json` at `path`."""
    if sorted(labels) != list(range(len(labels))) or len(labels) < 2:
        raise UserError(f"{path}: id2label does not name two labels or more, from 0 on")
    if not all(labels.values()) or len(set(labels.values())) < len(labels):
        raise UserError(f"{path}: two labels of id2label have the same name, or one has none")
    if (kind := read_json(path).get("problem_type")) not in (None, "single_label_classification"):
        raise UserError(f"{path}: problem_type is {kind}; here one label is right")


def load_tokenizer(directory: Path, config: BertConfig, remove_markup: bool = True) -> Tokenizer:
    """The tokenizer of a model directory, for all that trains or asks the model: without markup.

    A classifier that another program trained with markup keeps it: `remove_markup` False follows
    the files. Raises UserError where an id has no embedding.
    """
    tokenizer = Tokenizer.load(directory, remove_markup)
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size:,} ids, the model {config.vocab_size:,} embeddings"
        raise UserError(f"{directory}: the tokenizer has {sizes}")
    return tokenizer


def check_max_len(max_len: object, config: BertConfig, where: Path) -> None:
    """Raise UserError unless [CLS], a token and [SEP] fit into it, and it into the model."""
    if not isinstance(max_len, int) or not 3 <= max_len <= config.max_position_embeddings:
        raise UserError(f"{where} is damaged: max_len {max_len}")
