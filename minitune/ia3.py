"""(IA)³ (Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning"): a vector that multiplies keys, one for values, one for feed-forward units.

The pretrained network is frozen. In each layer three vectors are trained, which start at 1, so
training starts from what the pretrained network computes. The pooler and the classifier, which read
[CLS], are trained too. After training the vectors can be multiplied into the matrices.
"""

import torch
from torch import Tensor, nn

from minitune.adapters import parameters_of
from minitune.model import Bert


class ScaledKeysAndValues(nn.Linear):
    """The linear map to queries, keys and values, with keys and values multiplied by vectors."""

    def __init__(self, linear: nn.Linear):
        # "meta" takes no memory: weight and bias are replaced below.
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.keys = nn.Parameter(torch.ones(linear.out_features // 3))
        self.values = nn.Parameter(torch.ones(linear.out_features // 3))

    def scale(self) -> Tensor:
        """A factor for each output."""
        return torch.cat([torch.ones_like(self.keys), self.keys, self.values])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale()

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One linear map that computes the same."""
        # "meta" takes no memory: weight and bias are replaced below.
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter(self.weight.float() * self.scale()[:, None])
        linear.bias = nn.Parameter(self.bias.float() * self.scale())
        return linear


class ScaledUnits(nn.Linear):
    """The linear map from the feed-forward units, each of which is multiplied by a number."""

    def __init__(self, linear: nn.Linear):
        # "meta" takes no memory: weight and bias are replaced below.
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.units = nn.Parameter(torch.ones(linear.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.units)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One linear map that computes the same."""
        # "meta" takes no memory: weight and bias are replaced below.
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter(self.weight.float() * self.units)
        linear.bias = self.bias
        return linear


def insert_ia3(bert: Bert) -> None:
    """Put three new vectors into every layer."""
    for layer in bert.layers:
        layer.attention.qkv = ScaledKeysAndValues(layer.attention.qkv)
        layer.feed_forward.down = ScaledUnits(layer.feed_forward.down)


def ia3_parameters(model: nn.Module) -> list[str]:
    """The names of what is trained with (IA)³; all other parameters are frozen."""
    vectors = ("attention.qkv.keys", "attention.qkv.values", "feed_forward.down.units")
    layers = range(len(model.bert.layers))
    new = [f"bert.layers.{i}.{vector}" for i in layers for vector in vectors]
    return [*new, *parameters_of(model, ["pooler", "classifier"])]
