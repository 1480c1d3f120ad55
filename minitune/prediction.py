"""Fine-tuned models on disk, and new reviews labelled with them.

Full fine-tuning leaves a whole BERT directory (checkpoint.py). The other methods leave what they trained
and what it belongs to:

    trained.safetensors   adapters, LayerNorms and head; or the head alone
    trained.json          method, label names, longest text, and path and SHA-256 of the base model
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from minitune.adapters import AdapterSwitch, adapter_modules, new_adapter_modules
from minitune.batching import sorted_batches
from minitune.checkpoint import load_classifier, load_for_classification, weights_hash
from minitune.classification import Sequences
from minitune.errors import UserError
from minitune.features import FeatureClassifier
from minitune.files import read_json, write_json, write_tensors
from minitune.model import BertConfig
from minitune.precision import Precision
from minitune.sources import find_model
from minitune.tokenizer import Tokenizer

BLOCK = 2048  # texts that are in memory at a time


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

    `base` is the pretrained model's name or directory, `base_hash` the checkpoint.weights_hash of it.
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
    path = str(Path(base).resolve()) if Path(base).is_dir() else base  # found again from any directory
    write_json(directory / "trained.json", description | {"base": {"path": path, "sha256": base_hash}})
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
            raise UserError(f"{directory} was trained on another base model than the one now in {source}")
        return source

    def adapter_modules(self, config: BertConfig, directory: Path) -> dict[str, nn.Module]:
        """The trained modules, for adapters.AdapterSwitch or to put into a model."""
        try:
            modules = new_adapter_modules(config, self.adapter_size, len(self.labels))
            for path, module in modules.items():
                fill(module, path, self.tensors)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{directory}/trained.safetensors does not fit its description") from error
        return modules


def load_adapters(runs: dict[str, str], attention: str = "auto") -> AdapterSwitch:
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


@dataclass
class Prediction:
    """The answer for one text."""

    text: str
    label: str
    probabilities: dict[str, float]
    truncated: bool

    def cells(self) -> dict[str, str]:
        """The columns of its line in a table, the text last since it is the longest."""
        probability, truncated = f"{self.probabilities[self.label]:.4f}", str(self.truncated).lower()
        return {"label": self.label, "probability": probability, "truncated": truncated, "text": self.text}


class Classifier:
    """A fine-tuned model with its tokenizer and label names, ready for new texts."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, labels: dict[int, str], max_len: int):
        self.model, self.tokenizer, self.labels, self.max_len = model.eval(), tokenizer, labels, max_len

    @classmethod
    def load(cls, name: str, attention: str = "auto") -> "Classifier":
        """From the directory of any fine-tuning run, or a BertForSequenceClassification directory or id."""
        directory = find_model(name)
        if not (directory / "trained.json").is_file():
            model = load_classifier(directory, attention)
            settings, max_len = directory / "settings.json", model.config.max_position_embeddings
            if settings.is_file():
                max_len = read_json(settings).get("max_len", max_len)
            check_max_len(max_len, model.config, settings)
            return cls(model, Tokenizer.load(directory), model.config.id2label, max_len)
        trained = Trained.read(directory)
        base = trained.find_base(directory)
        model = load_for_classification(base, trained.labels, attention)
        check_max_len(trained.max_len, model.config, directory / "trained.json")
        if trained.method == "adapter":
            switch = AdapterSwitch(model)
            switch.add(name, trained.adapter_modules(model.config, directory), trained.labels)
            model = switch.use(name)
        else:
            model = FeatureClassifier(model.bert, len(trained.labels))
            try:
                fill(model.head, "head", trained.tensors)
            except RuntimeError as error:
                raise UserError(f"{directory}/trained.safetensors does not fit its description") from error
        return cls(model, Tokenizer.load(base), trained.labels, trained.max_len)

    def predict(
        self, texts: Iterable[str], device: torch.device, precision: Precision, batch_tokens: int
    ) -> Iterator[Prediction]:
        """One prediction a text, in the order of the texts; read and answered a block at a time."""
        self.model.to(device)
        texts = iter(texts)
        while block := list(itertools.islice(texts, BLOCK)):
            sequences = Sequences(block, self.tokenizer, self.max_len)
            probabilities = torch.empty(len(block), len(self.labels))
            # One context for all batches: while it lasts, autocast keeps what it has made of weights that
            # require gradients (of others, and under inference_mode, it keeps nothing).
            with torch.no_grad(), precision.autocast(device):
                for indices in sorted_batches(sequences.lengths, batch_tokens):
                    logits = self.model(sequences.pack(indices).to(device))
                    probabilities[torch.from_numpy(indices)] = logits.float().softmax(-1).cpu()
            for text, p, truncated in zip(block, probabilities.tolist(), sequences.truncated, strict=True):
                label = max(range(len(p)), key=p.__getitem__)
                by_name = {self.labels[i]: p[i] for i in range(len(p))}
                yield Prediction(text, self.labels[label], by_name, truncated)
