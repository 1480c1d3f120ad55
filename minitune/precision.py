"""Mixed precision: which number format the matrix products run in."""

import contextlib
import functools
from dataclasses import dataclass

import torch
from torch import nn

from minitune.errors import UserError


@functools.cache  # Muon asks at every step
def multiplies_bf16(device: torch.device) -> bool:
    """Whether this hardware has bfloat16 products; emulated, they are slower than float32 by far."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@dataclass
class Precision:
    """"fp32", "bf16" or "fp16". The last two by autocast: what trains, LayerNorm and loss stay float32."""

    name: str
    why: str = "as asked"

    @classmethod
    def choose(cls, asked: str, device: torch.device) -> "Precision":
        """`auto` is bf16 where the hardware multiplies it, else fp32."""
        if asked == "fp16" and device.type == "cpu":
            raise UserError("--precision fp16 needs a CUDA device; on a CPU use bf16 or fp32")
        if asked != "auto":
            return cls(asked)
        has = multiplies_bf16(device)
        where = "this GPU" if device.type == "cuda" else "this processor"
        return cls("bf16" if has else "fp32", f"{where} {'has' if has else 'has no'} bf16 products")

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return names[self.name]

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The context to run forward passes in."""
        return torch.autocast(device.type, self.dtype, enabled=self.name != "fp32")

    def cast_frozen(self, module: nn.Module) -> None:
        """Put the linear maps in it that are frozen into the format of the products, for good.

        The numbers are those of autocast, which would make them anew from float32 for every batch.
        """
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                for p in linear.parameters():
                    if not p.requires_grad:
                        p.data = p.data.to(self.dtype)
