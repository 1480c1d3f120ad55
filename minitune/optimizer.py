"""The optimizers, Muon and AdamW, and the learning-rate schedule.

Muon (Jordan et al. 2024) updates a matrix by the orthogonal matrix that is nearest to its momentum:
all directions move by the same amount, also those with small gradients. It is for the linear maps
inside the layers. Embeddings, head, biases and LayerNorms are updated by AdamW (Loshchilov & Hutter
2019).
"""

import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minitune.support.runtime import multiplies_bf16


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by Newton-Schulz iterations (Jordan et al. 2024).

    It differs from `torch.optim.Muon` in two ways, for speed. Where bfloat16 is slow it multiplies
    in float32, and it computes matrices of the same shape together.
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
                gradients = [p.grad for p in matrices]
                averages = [self.state[p]["momentum_buffer"] for p in matrices]
                # average = momentum * average + (1 - momentum) * gradient
                torch._foreach_lerp_(averages, gradients, 1 - momentum)
                updates = torch._foreach_lerp(gradients, averages, momentum)  # Nesterov momentum
                updates = newton_schulz(torch.stack(updates))
                # So that the outputs of a tall matrix change as much as those of a square one.
                rate = lr * max(1, rows / columns) ** 0.5
                torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
                torch._foreach_sub_(matrices, list(updates.mul_(rate)))


COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # chosen so that small singular values grow fast
ITERATIONS = 4  # a fifth cheaper than five, and no worse (tests/benchmarks/LOG.md)


def newton_schulz(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrices, (N, rows, columns): singular values 0.7 to 1.2."""
    X = matrices.to(torch.bfloat16 if multiplies_bf16(matrices.device) else torch.float32)
    is_tall = X.size(1) > X.size(2)  # then XᵀX is smaller than XXᵀ
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    # Each iteration gives aX + bXXᵀX + c(XXᵀ)²X: a singular value s becomes as + bs³ + cs⁵.
    for _ in range(ITERATIONS):
        A = X.mT @ X if is_tall else X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        left, right = (X, B) if is_tall else (B, X)
        X = torch.baddbmm(X, left, right, beta=a)  # a X + B X, or a X + X B
    return X.to(matrices.dtype)


@dataclass(frozen=True)
class LRMultipliers:
    """Factors of AdamW's learning rate for parts of a model. Muon's matrices have none.

    The embedding of a word gets a gradient only at steps that read the word. Hence `embeddings`
    that were random until recently get a factor above 1. Lower layers have learned what is more
    general and need less change: from the highest layer down to the lowest the factor falls from 1
    to `lowest_layer`, by the same ratio between each layer and the next (Howard & Ruder 2018,
    "Universal Language Model Fine-tuning for Text Classification", section 3.2).
    """

    embeddings: float = 1.0
    lowest_layer: float = 1.0

    def of(self, name: str, layers: int) -> float:
        """The factor for the parameter with this name, in a model of `layers` layers."""
        if ".embeddings." in name and ".norm." not in name:
            return self.embeddings
        if match := re.search(r"\.layers\.(\d+)\.", name):
            return self.lowest_layer ** ((layers - 1 - int(match[1])) / max(1, layers - 1))
        return 1.0


class Optimizer:
    """Muon and AdamW (`parts`), which together update all parameters that are not frozen."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        lr: float,
        adamw_lr: float,
        weight_decay: float,
        multipliers: LRMultipliers = LRMultipliers(),
    ):
        """`name` is "muon" or "adamw", with peak rate `lr`; `adamw_lr` is for AdamW beside Muon."""
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parts, rest = [], dict(self.named)
        # From the numbers in names such as bert.layers.3.attention.out.weight.
        layers = 1 + max(map(int, re.findall(r"\.layers\.(\d+)\.", " ".join(rest))), default=0)
        if name == "muon":
            hidden = [key for key, p in rest.items() if p.ndim == 2 and ".layers." in key]
            self.parts.append(Muon([rest.pop(key) for key in hidden], lr, weight_decay))
        else:
            adamw_lr = lr
        groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        for key, p in rest.items():
            # Weight decay is for matrices: a bias or the gain of a LayerNorm need not be small.
            decay = weight_decay if p.ndim >= 2 else 0.0
            groups[adamw_lr * multipliers.of(key, layers), decay].append(p)
        groups = [{"params": ps, "lr": a, "weight_decay": b} for (a, b), ps in groups.items()]
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        for p in rest.values():  # so that a checkpoint before the first step has them too
            adamw.state[p] = {"step": torch.zeros((), device=p.device)}
            adamw.state[p] |= {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        self.parts.append(adamw)
        self.groups = [group for part in self.parts for group in part.param_groups]
        for group in self.groups:
            group["peak_lr"] = group["lr"]
        self.peaks = self.rates = None  # tensors after `keep_rates_on`

    def keep_rates_on(self, device: torch.device) -> None:
        """Keep the learning rates in a tensor, from which a CUDA graph reads them."""
        self.peaks = torch.tensor([group["peak_lr"] for group in self.groups], device=device)
        self.rates = self.peaks.clone()
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate

    def set_rate(self, factor: float) -> None:
        """Set all learning rates to this fraction of their peaks."""
        if self.rates is not None:
            torch.mul(self.peaks, factor, out=self.rates)
            return
        for group in self.groups:
            group["lr"] = group["peak_lr"] * factor

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for p in self.named.values():
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """All moments and step counts, by "parameter/key"; the tensors, not copies."""
        return {
            f"{name}/{key}": tensor
            for name, p in self.named.items()
            for part in self.parts
            for key, tensor in part.state.get(p, {}).items()
        }


def one_cycle(step: int, steps: int, warmup: float = 0.05) -> float:
    """The learning rate at a step, as a fraction of its peak: a short rise, then a line to zero.

    For a given number of steps this is better than a rate that stays high (Geiping & Goldstein
    2023, "Cramming", section 4.3).
    """
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))
