"""Muon for the hidden matrices, AdamW for everything else.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal one, so that
every direction moves by the same amount, the rare ones too. It is for maps from hidden vectors to
hidden vectors; embeddings, the head, biases and LayerNorms stay with AdamW (Loshchilov & Hutter
2019). What leaves the plateau early is not Muon but where training starts: initialization.py.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minitune.support.runtime import multiplies_bf16


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by Newton-Schulz iterations (Jordan et al. 2024).

    The rule is that of `torch.optim.Muon`, with two differences. Its products are always in
    bfloat16, which a processor without such products takes a hundred times as long for; here they
    are in float32 where that is so. And matrices of one shape are multiplied as one batch.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero: small singular values grow fastest
    ITERATIONS = 4  # instead of five: a fifth cheaper, no worse here

    def __init__(
        self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            lr, momentum, by_shape = group["lr"], group["momentum"], {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.shape, p.device), []).append(p)
            for (shape, _), matrices in by_shape.items():
                updates = []
                for p in matrices:
                    state = self.state[p]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                    updates.append(p.grad.lerp(average, momentum))  # Nesterov: look one step ahead
                # Tall matrices would otherwise change too little for each of their outputs.
                rate = lr * max(1, shape[0] / shape[1]) ** 0.5
                updates = torch.stack(updates)
                for p, update in zip(matrices, orthogonal(updates), strict=True):
                    p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> about the nearest orthogonal matrices: most singular values become 0.7 to 1.2."""
    X = matrices.to(torch.bfloat16 if multiplies_bf16(matrices.device) else torch.float32)
    if tall := X.size(1) > X.size(2):  # the square X Xᵀ should be the smaller one
        X = X.mT
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = Muon.COEFFICIENTS
    for _ in range(
        Muon.ITERATIONS
    ):  # aX + bXXᵀX + c(XXᵀ)²X: an odd polynomial of the singular values
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).to(matrices.dtype)


@dataclass(frozen=True)
class Rates:
    """Learning rates of AdamW by what a parameter belongs to, in multiples of the peak rate.

    The vector of a word moves only where a step reads the word: at a rate that suits what moves in
    all steps, a rare word stays about where it was. So `embeddings` of a young model want a larger
    one. (Positions and token types are raised with the words; not measured apart.) And what a layer
    has learned is the more general the lower it is: each layer learns more slowly than the one
    above it by the same factor, down to `lowest_layer` (Howard & Ruder 2018, "Universal Language
    Model Fine-tuning for Text Classification", section 3.2; unlike there, not the embeddings). What
    Muon has, learns at Muon's rate.
    """

    embeddings: float = 1.0
    lowest_layer: float = 1.0

    def multiple(self, name: str, layers: int) -> float:
        """Of the parameter with this name, in a model with so many layers."""
        if ".embeddings." in name and ".norm." not in name:
            return self.embeddings
        if inside := re.search(r"\.layers\.(\d+)\.", name):
            return self.lowest_layer ** ((layers - 1 - int(inside[1])) / max(1, layers - 1))
        return 1.0


class Optimizer:
    """Several torch optimizers stepped as one, with learning rates that follow one schedule."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        lr: float,
        adamw_lr: float,
        weight_decay: float,
        rates: Rates = Rates(),
    ):
        """`name` is "muon" or "adamw"; `lr` is that optimizer's, `adamw_lr` that of Muon's partner."""
        self.arguments = (name, lr, adamw_lr, weight_decay, rates)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = {name: p for name, p in named.items() if p.ndim == 2 and ".layers." in name}
        self.parts, rest = [], named
        if name == "muon":
            self.parts.append(Muon(list(hidden.values()), lr=lr, weight_decay=weight_decay))
            rest = {name: p for name, p in named.items() if name not in hidden}
        else:
            adamw_lr = lr
        numbers = [
            int(number) for name in named for number in re.findall(r"\.layers\.(\d+)\.", name)
        ]
        layers = 1 + max(numbers, default=0)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for path, p in rest.items():
            # Decay pulls matrices towards zero; a bias or a LayerNorm gain has no reason to be
            # small.
            decay = weight_decay if p.ndim >= 2 else 0.0
            groups.setdefault((adamw_lr * rates.multiple(path, layers), decay), []).append(p)
        groups = [
            {"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()
        ]
        self.parts.append(torch.optim.AdamW(groups, lr=adamw_lr, betas=(0.9, 0.98), fused=True))
        self.names = {id(p): name for name, p in named.items()}
        for group in self._groups():
            group["peak_lr"] = group["lr"]

    def for_copy(self, model: nn.Module) -> "Optimizer":
        """A fresh optimizer with the same options, for a copy of the model."""
        return Optimizer(model, *self.arguments)

    def _groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def set_rate(self, factor: float) -> None:
        """Use this fraction of every peak learning rate."""
        for group in self._groups():
            group["lr"] = group["peak_lr"] * factor

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All state as named tensors, "parameter/key"."""
        return {
            f"{self.names[id(p)]}/{key}": value
            for part in self.parts
            for p, state in part.state.items()
            for key, value in state.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for part in self.parts:
            for group in part.param_groups:
                for p in group["params"]:
                    prefix = self.names[id(p)] + "/"
                    part.state[p] = {
                        name.removeprefix(prefix): value.to(p.device)
                        for name, value in tensors.items()
                        if name.startswith(prefix)
                    }


def one_cycle(step: int, steps: int, warmup: float = 0.05) -> float:
    """Share of the peak learning rate at a step: a short rise, then a straight line down to zero.

    On a fixed budget the line that ends at zero with the last step beats a rate that stays high
    (Geiping & Goldstein 2023, "Cramming", section 4.3).
    """
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))
