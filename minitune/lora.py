"""LoRA (Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models").

The pretrained network is frozen. Beside the matrix W of a linear map stand two narrow matrices, A
with r rows and B with r columns, where the rank r is small:

    y = W x + b + (alpha / r) B A x

B A has the shape of W, but takes r (inputs + outputs) numbers instead of inputs × outputs. A starts
at random and B at zero, so training starts from what the pretrained network computes. (Were both
zero, neither would get a gradient.) With alpha / r, one learning rate suits several ranks. After
training, W + (alpha / r) B A can take the place of W, and the network is as fast as before.

A and B are trained, and the pooler and the classifier, which read [CLS]. The backward pass goes
through the frozen matrices but computes no gradient of them: a third less work.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.adapters import parameters_of
from minitune.fast.layers import ByteDropout
from minitune.model import Bert
from minitune.support.errors import UserError

# The linear maps of a layer: the module that computes them, and how BERT calls them. Query, key and
# value are one matrix multiplication here.
LINEAR_MAPS = {
    "attention.qkv": ("query", "key", "value"),
    "attention.out": ("attention.output.dense",),
    "feed_forward.up": ("intermediate.dense",),
    "feed_forward.down": ("output.dense",),
}
TARGETS = [target for targets in LINEAR_MAPS.values() for target in targets]


class LoRA(nn.Linear):
    """A frozen linear map with A and B beside it; or several maps of one size, computed as one.

    Weight and bias are those of `linear`, which computes `maps` maps. `chosen` has the numbers of
    those that get A and B. Shapes below: each map has `inputs` inputs and `outputs` outputs.
    """

    def __init__(
        self, linear: nn.Linear, maps: int, chosen: list[int], rank: int, scale: float,
        dropout: float = 0.0, dora: bool = False,
    ):  # fmt: skip
        # "meta" takes no memory: weight and bias are replaced below.
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.maps, self.chosen, self.scale = maps, chosen, scale
        self.dropout = ByteDropout(dropout)
        inputs, outputs = linear.in_features, linear.out_features // maps
        self.A = nn.Parameter((2 * torch.rand(len(chosen), rank, inputs) - 1) / math.sqrt(inputs))
        self.B = nn.Parameter(torch.zeros(len(chosen), outputs, rank))
        # DoRA only: the lengths of the rows of W, (chosen, outputs).
        self.magnitude = nn.Parameter(self.rows().norm(dim=2)) if dora else None

    def forward(self, x: Tensor) -> Tensor:
        """(R, inputs) to (R, maps · outputs)."""
        y = super().forward(x)  # W x + b
        narrow = F.linear(self.dropout(x), self.A.flatten(0, 1))  # (R, chosen · rank)
        # All B in one matrix, with zeros where a map would read what belongs to another. One
        # multiplication then adds scale · B A x to all maps, without a copy of y.
        outputs, updates = self.B.size(1), self.scale * self.B.mT
        wide = [
            F.pad(update, (k * outputs, (self.maps - 1 - k) * outputs))
            for k, update in zip(self.chosen, updates, strict=True)
        ]
        y = y.addmm_(narrow, torch.cat(wide).to(y.dtype))  # (chosen · rank, maps · outputs)
        return y if self.magnitude is None else self._rescale(y)

    def _rescale(self, y: Tensor) -> Tensor:
        """DoRA (Liu et al. 2024): rows of W + scale · B A give directions, their lengths train.

        The length that a row has by itself counts as a constant in the backward pass (section 4.3).
        """
        lengths = self.magnitude / self.adapted().norm(dim=2)
        factors = [torch.ones_like(lengths[0])] * self.maps
        for k, factor in zip(self.chosen, lengths, strict=True):
            factors[k] = factor
        return (y - self.bias) * torch.cat(factors) + self.bias

    def rows(self) -> Tensor:
        """W of the chosen maps: (chosen, outputs, inputs), in float32."""
        maps = self.weight.detach().float().chunk(self.maps)
        return torch.stack([maps[k] for k in self.chosen])

    @torch.no_grad()
    def adapted(self) -> Tensor:
        """W + scale · B A of the chosen maps: (chosen, outputs, inputs), in float32."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.rows() + self.scale * (self.B @ self.A)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One linear map that computes the same (without dropout)."""
        weight = self.adapted()
        if self.magnitude is not None:
            weight *= (self.magnitude / weight.norm(dim=2))[:, :, None]
        # "meta" takes no memory: weight and bias are replaced below.
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight.float().clone()), self.bias
        linear.weight.unflatten(0, (self.maps, -1))[self.chosen] = weight
        return linear


def scale_of(lora_rank: int, lora_alpha: float, rslora: bool) -> float:
    """By what B A is multiplied.

    rsLoRA (Kalajdzievski 2023): alpha / sqrt(r), since with alpha / r high ranks learn too slowly.
    """
    return lora_alpha / (math.sqrt(lora_rank) if rslora else lora_rank)


def insert_lora(
    bert: Bert, lora_targets: str, lora_rank: int, lora_alpha: float, lora_dropout: float = 0.0,
    rslora: bool = False, dora: bool = False,
) -> None:  # fmt: skip
    """Put LoRA around linear maps of every layer: those of TARGETS that `lora_targets` lists.

    Raises UserError for a target that does not exist, or a rank above the size of a map.
    """
    chosen = lora_targets.split(",")
    if unknown := [target for target in chosen if target not in TARGETS]:
        raise UserError(f"LoRA has no target {unknown[0]}: there are {', '.join(TARGETS)}")
    if lora_rank > (most := min(bert.config.hidden_size, bert.config.intermediate_size)):
        raise UserError(f"LoRA of rank {lora_rank}: the linear maps of this model have {most}")
    scale = scale_of(lora_rank, lora_alpha, rslora)
    for layer in bert.layers:
        for path, targets in LINEAR_MAPS.items():
            if numbers := [k for k, target in enumerate(targets) if target in chosen]:
                sizes = len(targets), numbers, lora_rank, scale, lora_dropout, dora
                layer.set_submodule(path, LoRA(layer.get_submodule(path), *sizes))


def lora_parameters(model: nn.Module) -> list[str]:
    """The names of what is trained with LoRA; all other parameters are frozen."""
    maps = {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}
    new = [f"{name}.{x}" for name, lora in maps.items() for x in ("A", "B", "magnitude")
           if getattr(lora, x) is not None]  # fmt: skip
    return [*new, *parameters_of(model, ["pooler", "classifier"])]
