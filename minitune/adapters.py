"""Bottleneck adapters (Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP").

The pretrained network is frozen. Inside each sublayer of each layer stands an adapter: down to a
few units, a nonlinearity, up again, and a skip connection around it. It begins as almost the
identity, so training starts from what the pretrained network computes. Trained are the adapters,
the LayerNorms of the layers, and the head; nothing else. As no trained tensor lies below the first
adapter, the backward pass stops there, and frozen matrices need no gradient of their own.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from minitune.model import Bert, BertConfig, BertForSequenceClassification, LayerNorm, MeanPooler


class Adapter(nn.Module):
    """x + up(gelu(down(x))), from C to `units` and back to C, for every token by itself."""

    def __init__(self, hidden_size: int, units: int):
        super().__init__()
        self.down = nn.Linear(hidden_size, units)
        self.up = nn.Linear(units, hidden_size)
        for linear in (self.down, self.up):
            # Nearly zero, so nearly the identity; not zero, or `down` would get no gradient.
            nn.init.trunc_normal_(linear.weight, std=1e-3, a=-2e-3, b=2e-3)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


def insert_adapters(bert: Bert, units: int) -> None:
    """Put a new adapter of `units` units into both sublayers of every layer."""
    for layer in bert.layers:
        layer.attention_adapter = Adapter(bert.config.hidden_size, units)
        layer.feed_forward_adapter = Adapter(bert.config.hidden_size, units)


def remove_adapters(bert: Bert) -> None:
    """Take them out again. LayerNorms stay as trained; the base's own are in its directory."""
    for layer in bert.layers:
        layer.attention_adapter = nn.Identity()
        layer.feed_forward_adapter = nn.Identity()


def adapter_modules(model: BertForSequenceClassification) -> dict[str, nn.Module]:
    """All that is trained with adapters, by its path in the model; the rest is frozen."""
    paths = ["classifier"]
    for i in range(len(model.bert.layers)):
        parts = ["attention_adapter", "attention_norm", "feed_forward_adapter", "feed_forward_norm"]
        paths += [f"bert.layers.{i}.{part}" for part in parts]
    return {path: model.get_submodule(path) for path in paths}


def new_adapter_modules(config: BertConfig, units: int, labels: int) -> dict[str, nn.Module]:
    """The same modules with nothing in them yet, to be filled from a file."""
    C = config.hidden_size
    modules = {"classifier": nn.Linear(C, labels)}
    for i in range(config.num_hidden_layers):
        modules |= {
            f"bert.layers.{i}.attention_adapter": Adapter(C, units),
            f"bert.layers.{i}.attention_norm": LayerNorm(C, eps=config.layer_norm_eps),
            f"bert.layers.{i}.feed_forward_adapter": Adapter(C, units),
            f"bert.layers.{i}.feed_forward_norm": LayerNorm(C, eps=config.layer_norm_eps),
        }
    return modules


class AdapterSwitch:
    """One base model in memory, and several sets of adapters that take turns in it, by name.

    A set is all that was trained together: adapters, LayerNorms and classifier. Switching puts
    other modules into the same places and copies nothing. prediction.load_adapters makes one from
    runs.
    """

    def __init__(self, model: BertForSequenceClassification):
        self.model = model
        self.model.pooler = MeanPooler()
        self.sets: dict[str, tuple[dict[str, nn.Module], dict[int, str]]] = {}

    def add(self, name: str, modules: dict[str, nn.Module], labels: dict[int, str]) -> None:
        """Keep a set, and the names of its labels, under this name.

        `modules` are what `adapter_modules` gives of a model with the same base, else ValueError.
        """
        if modules.keys() != adapter_modules(self.model).keys():
            raise ValueError("these modules belong to a model with other layers")
        self.sets[name] = modules, labels

    def use(self, name: str) -> BertForSequenceClassification:
        """The model with this set in place. Raises KeyError for an unknown name."""
        modules, labels = self.sets[name]
        device = self.model.bert.embeddings.word.weight.device
        for path, module in modules.items():
            self.model.set_submodule(path, module.to(device))
        self.model.config.id2label = labels
        return self.model
