"""The part of a mostly frozen model that a method trained, on disk, and whose part it is.

    trained.json          method, pooling, options, label names, longest text, base model
    trained.safetensors   the parameters that trained, and what was measured

The base model is not copied: it is found by its path, and known by the SHA-256 of its weights.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from minitune.checkpoint import weights_hash
from minitune.data import MOST_LABELS
from minitune.support.errors import UserError
from minitune.support.model_names import find_model
from minitune.support.runs import read_json, write_json, write_tensors
from minitune.support.tensor_file import TensorFile
from minitune.temperature import is_temperature


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a run changed, by name: parameters that train, and buffers, which it measured."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    tensors = model.state_dict(keep_vars=True).items()
    return {name: tensor for name, tensor in tensors if name not in frozen}


@dataclass
class Trained:
    """All that a prediction needs to know, besides the trained tensors and the base model."""

    method: str
    pooling: str
    options: dict  # of the method, {"adapter_size": 64} for example
    labels: dict[int, str]
    max_len: int
    base: str  # the pretrained model as it was named
    base_hash: str  # weights_hash of it; empty if unknown
    relative_base: str | None = None  # its path seen from the run, for when both were moved
    temperature: float = 1.0  # of its probabilities
    file, weights = "trained.json", "trained.safetensors"
    foreign = False  # written by another program, whose tokenizer may keep markup

    def save(self, model: nn.Module, directory: Path) -> Path:
        """Write both files; returns the path of the weights."""
        write_tensors(directory / self.weights, trained_tensors(model), {"format": "pt"})
        description = {"method": self.method, "pooling": self.pooling, **self.options}
        write_json(directory / self.file, description | self.context(directory))
        return directory / self.weights

    def context(self, directory: Path) -> dict:
        """Labels, longest text, base model and temperature, as they are saved."""
        path, relative = self.base, None
        if Path(path).is_dir():  # found again from any directory
            path = str(Path(path).resolve())
            relative = os.path.relpath(path, directory.resolve())
        base = {"path": path, "relative": relative, "sha256": self.base_hash}
        context = {"labels": list(self.labels.values()), "max_len": self.max_len, "base": base}
        return context | {"temperature": self.temperature}

    @classmethod
    def read(cls, directory: Path) -> "Trained":
        """From trained.json; raises UserError where it is damaged."""
        raw = read_json(directory / "trained.json")
        try:
            context = {key: raw.pop(key) for key in ("labels", "max_len", "base")}
            context["temperature"] = raw.pop("temperature", 1.0)
            method, pooling = raw.pop("method"), raw.pop("pooling")
            options = raw  # what is left are the options of the method
            if not method or not pooling or "\0" in method + pooling:
                raise ValueError("a name is empty")
            sizes = [] if pooling == "cloze" else options.values()
            if not all(type(value) is int and 0 < value <= 10_000 for value in sizes):
                raise ValueError(f"options {options}")
            return cls(method, pooling, options, **cls.parse_context(context))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{directory}/trained.json is damaged: {error!r}") from error

    @staticmethod
    def parse_context(raw: dict) -> dict:
        """The fields that `context` describes.

        Raises AttributeError, KeyError, TypeError or ValueError where it is damaged.
        """
        names, max_len, base = raw["labels"], raw["max_len"], raw["base"]
        path, relative, base_hash = base["path"], base.get("relative"), base["sha256"]
        strings = [path, base_hash, relative or ".", *names]
        if not all(strings) or "\0" in "".join(strings) or not "".join(strings).encode():
            raise ValueError("a name is empty")
        if not (type(names) is list and 2 <= len(set(names)) == len(names) <= MOST_LABELS):
            raise ValueError("labels")
        temperature = raw.get("temperature", 1.0)
        if not is_temperature(temperature):
            raise ValueError(f"temperature {temperature!r}")
        fields = {"labels": dict(enumerate(names)), "max_len": max_len, "base": path}
        fields |= {"base_hash": base_hash, "relative_base": relative}
        return fields | {"temperature": temperature}

    @property
    def is_whole(self) -> bool:
        """Whether all weights were trained, so that the run is its own base."""
        return self.relative_base == "."

    def find_base(self, directory: Path, named: str | None = None) -> Path:
        """The directory of the base model, if its weights still are the same.

        That is `named` if it is given, else where it was, else where it lies seen from the run.
        """
        places, reasons = [self.base if named is None else named], []
        if named is None and self.relative_base and (directory / self.relative_base).is_dir():
            places.append(str(directory / self.relative_base))
        for place in places:
            try:
                source = find_model(place)
                if self.base_hash in ("", weights_hash(source)):
                    return source
                reasons.append(f"it was trained on another base model than the one now in {source}")
            except UserError as error:
                reasons.append(str(error))
        raise UserError(f"{directory} needs its base model (--base): {'; '.join(reasons)}")

    def fill(self, model: nn.Module, directory: Path) -> None:
        """Put what was trained into a model on the same base, built by the same method."""
        weights = TensorFile(directory / self.weights, self.file)
        expected = trained_tensors(model)
        if weights.names.keys() != expected.keys():
            raise UserError(f"{weights.path} does not fit its description in trained.json")
        tensors = {name: weights.read(name, tuple(t.shape)) for name, t in expected.items()}
        model.load_state_dict(tensors, strict=False, assign=True)
