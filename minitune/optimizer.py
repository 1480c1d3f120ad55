"""Muon for the hidden matrices, AdamW for everything else, and the learning-rate schedule.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal one, so that
every direction moves by the same amount, the rare ones too. It is for maps from hidden vectors to
hidden vectors; embeddings, head, biases and LayerNorms stay with AdamW (Loshchilov & Hutter 2019).
"""

import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minitune.support.runtime import multiplies_bf16


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by Newton-Schulz iterations (Jordan et al. 2024).

    Two differences to `torch.optim.Muon`: processors without bfloat16 instructions multiply in
    float32, which is a hundred times faster there, and matrices of one shape form one batch.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        for p in params:
            self.state[p] = {"momentum_buffer": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            lr, momentum, by_shape = group["lr"], group["momentum"], defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for (rows, columns), matrices in by_shape.items():
                updates = []
                for p in matrices:
                    average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                    updates.append(p.grad.lerp(average, momentum))  # Nesterov: look one step ahead
                updates = newton_schulz(torch.stack(updates))
                # Tall matrices are scaled up, so that each of their outputs changes as much.
                rate = lr * max(1, rows / columns) ** 0.5
                for p, update in zip(matrices, updates, strict=True):
                    p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-rate)


COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero: small singular values grow fastest
ITERATIONS = 4  # a fifth cheaper than five, and no worse (tests/benchmarks/LOG.md)


def newton_schulz(matrices: Tensor) -> Tensor:
    """(N, rows, columns): about the nearest orthogonal matrices, singular values 0.7 to 1.2."""
    X = matrices.to(torch.bfloat16 if multiplies_bf16(matrices.device) else torch.float32)
    if is_tall := X.size(1) > X.size(2):  # XXᵀ should be the smaller square
        X = X.mT
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):  # aX + bXXᵀX + c(XXᵀ)²X: a polynomial of each singular value
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if is_tall else X).to(matrices.dtype)


@dataclass(frozen=True)
class LRMultipliers:
    """Learning rates of AdamW by the place of a parameter, in multiples of the peak rate.

    A word's vector moves only at steps that read the word, so `embeddings` that began at random not
    long ago are trained with more than 1. Lower layers have learned more general things: each
    layer learns more slowly than the one above it by the same factor, down to `lowest_layer`
    (Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", section
    3.2). Muon's matrices are exempt.
    """

    embeddings: float = 1.0
    lowest_layer: float = 1.0

    def of(self, name: str, layers: int) -> float:
        """The multiplier of the parameter with this name, in a model with so many layers."""
        if ".embeddings." in name and ".norm." not in name:
            return self.embeddings
        if match := re.search(r"\.layers\.(\d+)\.", name):
            return self.lowest_layer ** ((layers - 1 - int(match[1])) / max(1, layers - 1))
        return 1.0


class Optimizer:
    """Muon and AdamW stepped as one, with learning rates that follow one schedule."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        lr: float,
        adamw_lr: float,
        weight_decay: float,
        multipliers: LRMultipliers = LRMultipliers(),
    ):
        """`name`: "muon" or "adamw"; `lr` is that optimizer's, `adamw_lr` AdamW's beside Muon."""
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parts, rest = [], dict(self.named)
        layers = 1 + max(map(int, re.findall(r"\.layers\.(\d+)\.", " ".join(rest))), default=0)
        if name == "muon":
            hidden = [key for key, p in rest.items() if p.ndim == 2 and ".layers." in key]
            self.parts.append(Muon([rest.pop(key) for key in hidden], lr, weight_decay))
        else:
            adamw_lr = lr
        groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        for key, p in rest.items():
            # Decay pulls matrices towards zero; a bias or a LayerNorm gain need not be small.
            decay = weight_decay if p.ndim >= 2 else 0.0
            groups[adamw_lr * multipliers.of(key, layers), decay].append(p)
        groups = [{"params": ps, "lr": a, "weight_decay": b} for (a, b), ps in groups.items()]
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        for p in rest.values():  # now, so that a checkpoint before step 1 is complete
            adamw.state[p] = {"step": torch.zeros((), device=p.device)}
            adamw.state[p] |= {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        self.parts.append(adamw)
        self.groups = [group for part in self.parts for group in part.param_groups]
        for group in self.groups:
            group["peak_lr"] = group["lr"]

    def set_rate(self, factor: float) -> None:
        """Use this fraction of every peak learning rate."""
        for group in self.groups:
            group["lr"] = group["peak_lr"] * factor

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for p in self.named.values():
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """All moments and step counts, named "parameter/key": the tensors themselves."""
        return {
            f"{name}/{key}": tensor
            for name, p in self.named.items()
            for part in self.parts
            for key, tensor in part.state.get(p, {}).items()
        }


def one_cycle(step: int, steps: int, warmup: float = 0.05) -> float:
    """The fraction of the peak learning rate at a step: a short rise, then linear decay to zero.

    On a fixed budget that beats a rate that stays high (Geiping & Goldstein 2023, "Cramming", 4.3).
    """
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))
