"""What makes layers fast on a CPU and changes no result."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS = 64


def pad_rows(x: Tensor) -> Tensor:
    """(N, …) with rows of zeros after it, to a multiple of ROWS, and for large N of a larger power of two.

    They are an eighth of N at most, or less than ROWS. On another device than a CPU there are none.

    The matrices of a network then have few different numbers of rows. On a CPU with bfloat16
    products oneDNN compiles a kernel for each of these, which took a tenth of all training and
    more.
    """
    if x.device.type != "cpu":
        return x
    N = x.size(0)
    multiple = max(ROWS, 2 ** (N.bit_length() - 4))
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, -N % multiple))


class Dropout(nn.Dropout):
    """nn.Dropout, on a CPU by one random byte a number: p is the nearest multiple of 1/256 but 0 and 1.

    There nn.Dropout draws a float for each number, which takes four times as long as all of this.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or x.device.type != "cpu":
            return super().forward(x)
        drop = min(max(round(256 * self.p), 1), 255)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(
            -(2**63), None
        )  # all 64 bits
        noise = words.view(torch.uint8)[: x.numel()].view(x.shape)
        # 0 or 1, not by a comparison: bools take three times as long. Autograd keeps the bytes.
        kept = noise.clamp_(drop - 1, drop).sub_(drop - 1)
        return (x * kept).mul_(256 / (256 - drop))


class GeluLinear(torch.autograd.Function):
    """gelu(x) Wᵀ + b, which keeps x for the way back and makes gelu(x) again, where autograd keeps both.

    That is an eighth less of all that a layer keeps, for one more GELU (checkpointing, Chen et al.
    2016).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = torch.ops.aten.gelu_backward(d_out @ weight, x) if ctx.needs_input_grad[0] else None
        d_weight = d_out.mT @ F.gelu(x) if ctx.needs_input_grad[1] else None
        d_bias = d_out.sum(0) if ctx.needs_input_grad[2] else None
        return dx, d_weight, d_bias
