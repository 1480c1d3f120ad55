"""Bottleneck adapters (Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP").

The pretrained network is frozen. Inside each sublayer of each layer stands an adapter: down to a
few units, a nonlinearity, up again, and a skip connection around it. It begins as almost the
identity, so training starts from what the pretrained network computes. The adapters, the LayerNorms
of the layers and the classifier are trained, and nothing else. No trained tensor lies below the
first adapter, so the backward pass stops there, and frozen matrices need no gradient.
"""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from minitune.model import Bert


class Adapter(nn.Module):
    """x + up(gelu(down(x))): from C to `units` and back to C, for each token by itself."""

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


def insert_adapters(bert: Bert, adapter_size: int) -> None:
    """Put a new adapter of `adapter_size` units into both sublayers of every layer."""
    for layer in bert.layers:
        layer.attention_adapter = Adapter(bert.config.hidden_size, adapter_size)
        layer.feed_forward_adapter = Adapter(bert.config.hidden_size, adapter_size)


def adapter_parameters(model: nn.Module) -> list[str]:
    """The names of what is trained with adapters; all other parameters are frozen."""
    parts = ("attention_adapter", "attention_norm", "feed_forward_adapter", "feed_forward_norm")
    layers = range(len(model.bert.layers))
    return parameters_of(
        model, ["classifier", *(f"bert.layers.{i}.{part}" for i in layers for part in parts)]
    )


def parameters_of(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """The names of all parameters of these modules, each given by its path in the model.

    A module that is not there has none: a cloze needs no classifier (cloze.py).
    """
    names = [name for name, _ in model.named_parameters()]
    return [name for path in modules for name in names if name.startswith(f"{path}.")]
