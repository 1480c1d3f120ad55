"""LoRA and (IA)³ on disk, in the layout of Hugging Face's library peft.

    adapter_config.json         the method and its options, by peft's names for them
    adapter_model.safetensors   what was trained, by the names that BERT's modules have there

What is written here loads with `peft.PeftModel.from_pretrained` on the same base, and what peft
saved of a `BertForSequenceClassification` loads here, or is refused; nothing in it is skipped.
Labels, longest text and the base's hash stand in `auto_mapping`, which peft keeps but does not
read, since `task_type` tells it which class the base has.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minitune.checkpoint import (
    bert_names,
    check_labels,
    open_weights,
    read_config,
    weights_hash,
)
from minitune.data import MOST_LABELS
from minitune.ia3 import ScaledKeysAndValues, ScaledUnits
from minitune.lora import TARGETS, LoRA, scale_of
from minitune.support.errors import UserError, plural
from minitune.support.model_names import find_model
from minitune.support.runs import read_json, write_json, write_tensors
from minitune.support.tensor_file import TensorFile
from minitune.trained import Trained

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of all names: peft wraps a model twice
METHODS_OF_PEFT = {"LORA": "lora", "IA3": "ia3"}
# Fields that say how training began, or which tensors there are, which the tensors' names say, too.
WITHOUT_EFFECT = {
    "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "auto_mapping",
    "inference_mode", "target_modules", "exclude_modules", "modules_to_save", "feedforward_modules",
    "layers_to_transform", "layers_pattern", "init_ia3_weights", "fan_in_fan_out", "megatron_core",
    "qalora_group_size", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora",
}  # fmt: skip
# These leave the base as it is. "pissa" and others take something away from it.
INITIAL = {"init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"), "bias": ("none",)}
SAME_OPTIONS = {"rslora": "use_rslora", "dora": "use_dora", "lora_rank": "r"}
SAME_OPTIONS |= {name: name for name in ("lora_alpha", "lora_dropout")}
POOLER = {f"{PREFIX}bert.pooler.dense.{key}" for key in ("weight", "bias")}
FORM = re.compile(
    re.escape(PREFIX) + r"(classifier|bert\.pooler\.dense|"
    r"bert\.encoder\.layer\.\d+\.(attention\.self\.)?(?P<target>[a-z.]+))"
    r"\.(weight|bias|lora_[AB]\.weight|lora_magnitude_vector|ia3_l)"
)


def peft_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Views of all that `lora` or `ia3` trains in a model, by peft's names."""
    tensors = {f"classifier.{key}": tensor for key, tensor in model.classifier.named_parameters()}
    for key in ("weight", "bias"):
        tensors[f"bert.pooler.dense.{key}"] = model.pooler.dense.get_parameter(key)
    for path, module in model.named_modules():
        names = [name.removesuffix(".weight") for name in bert_names(f"{path}.weight")]
        if isinstance(module, LoRA):
            for i, k in enumerate(module.chosen):
                tensors[f"{names[k]}.lora_A.weight"] = module.A[i]
                tensors[f"{names[k]}.lora_B.weight"] = module.B[i]
                if module.magnitude is not None:
                    tensors[f"{names[k]}.lora_magnitude_vector"] = module.magnitude[i]
        if isinstance(module, ScaledKeysAndValues):
            tensors[f"{names[1]}.ia3_l"] = module.keys[:, None]
            tensors[f"{names[2]}.ia3_l"] = module.values[:, None]
        if isinstance(module, ScaledUnits):
            tensors[f"{names[0]}.ia3_l"] = module.units[None, :]
    return {PREFIX + name: tensor.detach() for name, tensor in tensors.items()}


def module_pattern(targets: list[str]) -> str:
    """A regular expression for the paths of these modules in all layers.

    The ends of the paths alone would not do: `output.dense` ends `attention.output.dense`, too.
    """
    inside = ("query", "key", "value")
    paths = [f"attention.self.{target}" if target in inside else target for target in targets]
    return r"bert\.encoder\.layer\.\d+\.({})".format("|".join(map(re.escape, paths)))


@dataclass
class PeftDirectory(Trained):
    """A `Trained` in peft's layout. Of one that peft wrote, labels and hash come from the base."""

    foreign: bool = False  # peft wrote it
    file, weights = CONFIG, WEIGHTS

    def save(self, model: nn.Module, directory: Path) -> Path:
        """Write both files; returns the path of the weights."""
        write_tensors(directory / WEIGHTS, peft_tensors(model), {"format": "pt"})
        more = self.context(directory)
        base = more["base"]["path"]
        if base == "minilm":  # a word that only minitune knows
            base = str(find_model(base))
        config = {"task_type": "SEQ_CLS", "base_model_name_or_path": base}
        config |= {"inference_mode": True, "modules_to_save": ["pooler", "classifier"]}
        if self.method == "lora":
            config |= {"peft_type": "LORA", "bias": "none"}
            config |= {theirs: self.options[ours] for ours, theirs in SAME_OPTIONS.items()}
            config["target_modules"] = module_pattern(self.options["lora_targets"].split(","))
        else:
            config |= {"peft_type": "IA3", "feedforward_modules": module_pattern(["output.dense"])}
            config["target_modules"] = module_pattern(["key", "value", "output.dense"])
        write_json(directory / CONFIG, config | {"auto_mapping": {"minitune": more}})
        return directory / WEIGHTS

    @classmethod
    def read(cls, directory: Path) -> "PeftDirectory":
        """From adapter_config.json and the names of the tensors.

        Raises UserError where one of them is damaged, or says what minitune does not compute.
        """
        path = directory / CONFIG
        config = read_json(path)
        if (kind := config.get("peft_type")) not in list(METHODS_OF_PEFT):
            raise UserError(
                f"{path}: peft_type is {kind}; minitune has {', '.join(METHODS_OF_PEFT)}"
            )
        for key, value in config.items():
            if not is_computed(key, value):
                raise UserError(f"{path}: minitune has no {key}, which is {str(value)[:80]}")
        names = TensorFile(directory / WEIGHTS, CONFIG).names
        found = {name: FORM.fullmatch(name) for name in names}
        for name in (name for name, match in found.items() if not match):
            raise UserError(f"{directory / WEIGHTS}: minitune has no {name[:200]}")
        targets = {match["target"] for match in found.values()} & set(TARGETS)
        method, options = METHODS_OF_PEFT[kind], {}
        try:
            if method == "lora":
                # Before peft had these two, it computed as without them.
                config = {"use_rslora": False, "use_dora": False} | config
                options = {ours: config[theirs] for ours, theirs in SAME_OPTIONS.items()}
                check_options(**options)
                if not targets:
                    raise ValueError("LoRA on no linear map of a layer")
                options["lora_targets"] = ",".join(sorted(targets, key=TARGETS.index))
            path = config.get("base_model_name_or_path") or ""
            if type(path) is not str or "\0" in path:
                raise ValueError(f"base_model_name_or_path {path!r}")
            more = (config.get("auto_mapping") or {}).get("minitune")
            if more is None:  # then `find_base` fills in what is empty here
                return cls(method, "cls", options, {}, 0, path, base_hash="", foreign=True)
            return cls(method, "cls", options, **cls.parse_context(more))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{directory / CONFIG} is damaged: {error!r}") from error

    def find_base(self, directory: Path, named: str | None = None) -> Path:
        """As of any `Trained`, with what a directory of peft leaves to its base."""
        if not (self.base or named):
            raise UserError(f"{directory} does not name its base model: give --base")
        source = super().find_base(directory, named)
        weights, config = TensorFile(directory / WEIGHTS, CONFIG), read_config(source)
        if not POOLER & {*weights.names, *(PREFIX + name for name in open_weights(source).names)}:
            raise UserError(f"{directory} has no pooler, nor has its base model {source}")
        if self.foreign:
            self.base_hash, self.max_len = weights_hash(source), config.max_position_embeddings
            count, *_ = weights.shape(f"{PREFIX}classifier.weight") or (0,)
            if count < 2:
                raise UserError(f"{weights.path}: a classifier of {plural(count, 'label')}")
            self.labels = config.id2label
            if len(self.labels) != count:
                self.labels = {k: f"LABEL_{k}" for k in range(min(count, MOST_LABELS))}
            check_labels(self.labels, source / "config.json")
        return source

    @torch.no_grad()
    def fill(self, model: nn.Module, directory: Path) -> None:
        """Give a model on the same base, built by the same method, what was trained."""
        weights = TensorFile(directory / WEIGHTS, CONFIG)
        empty = {name: p for name, p in model.named_parameters() if p.is_meta}
        empty = {name: torch.empty_like(p, device="cpu") for name, p in empty.items()}
        model.load_state_dict(empty, strict=False, assign=True)
        has_lora = f"{PREFIX}bert.pooler.dense.lora_A.weight" in weights.names
        if has_lora and self.method == "lora":
            rank, dora = self.options["lora_rank"], self.options["dora"]
            scale = scale_of(rank, self.options["lora_alpha"], self.options["rslora"])
            model.pooler.dense = LoRA(model.pooler.dense, 1, [0], rank, scale, dora=dora)
        tensors = peft_tensors(model)
        for name in weights.names.keys() - tensors.keys():
            raise UserError(f"{weights.path}: there is no {name} in a model of this description")
        for name, tensor in tensors.items():
            if name not in POOLER or POOLER & weights.names.keys():  # else it is the base's
                tensor.copy_(weights.read(name, tuple(tensor.shape)))
        if isinstance(model.pooler.dense, LoRA):  # minitune trains all of the pooler
            model.pooler.dense = model.pooler.dense.merged().requires_grad_(True)


def is_computed(key: str, value: object) -> bool:
    """Whether minitune computes what this field of adapter_config.json asks for."""
    if key in INITIAL:  # other values would mean another base
        return value in INITIAL[key]
    # What is false, null or empty asks for nothing.
    return key in WITHOUT_EFFECT or not value


def check_options(lora_rank: int, lora_alpha: float, lora_dropout: float, **switches: bool) -> None:
    """Raise ValueError where these are no options of LoRA."""
    numbers = {type(lora_alpha), type(lora_dropout)} <= {int, float}
    # Not NaN, and no more than float32 has room for.
    good = type(lora_rank) is int and lora_rank > 0 and numbers and abs(lora_alpha) < 1e38
    if not good or not 0 <= lora_dropout < 1 or {*map(type, switches.values())} - {bool}:
        raise ValueError(f"r {lora_rank}, lora_alpha {lora_alpha}, lora_dropout {lora_dropout}")


def read_trained(directory: Path) -> Trained | None:
    """What a directory holds of a mostly frozen model; None where it is no such directory."""
    if (directory / "trained.json").is_file():
        return Trained.read(directory)
    return PeftDirectory.read(directory) if (directory / CONFIG).is_file() else None
