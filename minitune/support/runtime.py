"""One process or several: the little that data-parallel training asks of `torch.distributed`.

`torchrun --nproc-per-node N train.py` starts N processes with the environment set; without it there
is one. Every process computes a share of each batch, gradients are summed, and only the main
process writes.
"""

import contextlib
import ctypes
import functools
import gc
import os
import resource
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitune.support.errors import UserError


class Processes:
    """Who am I, how many are we, and which device is mine."""

    def __init__(self, device: str = "auto"):
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and self.count > 1:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        self.device = torch.device(device)
        if self.count > 1:
            backend = "gloo" if device == "cpu" else "nccl"
            # The others wait while the main process tokenises, and a large corpus takes hours.
            dist.init_process_group(backend, timeout=timedelta(days=1))

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of this tensor over all processes, on the tensor's device."""
        if self.count > 1:
            moved = tensor.to(self.device)  # NCCL sums on the GPU only
            dist.all_reduce(moved)
            tensor.copy_(moved)
        return tensor

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in one message."""
        if self.count == 1:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = self.sum(torch.cat([p.grad.flatten() for p in parameters]))
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(grad.view_as(p))

    def broadcast(self, value: Any) -> Any:
        """The main process's value, everywhere."""
        if self.count > 1:
            box = [value]
            dist.broadcast_object_list(box, device=self.device)
            value = box[0]
        return value

    def barrier(self) -> None:
        """Until all processes are here."""
        self.broadcast(None)

    def close(self) -> None:
        """Leave the group."""
        if self.count > 1:
            dist.destroy_process_group()


@functools.cache  # Muon asks at every step
def multiplies_bf16(device: torch.device) -> bool:
    """Whether this hardware has bfloat16 products; emulated, they are slower than float32 by far."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@dataclass
class Precision:
    """ "fp32", "bf16" or "fp16". The last two by autocast: what trains, LayerNorm and loss stay float32."""

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


def check_device(name: str) -> None:
    """Refuse a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here")


def describe(device: torch.device) -> str:
    """The device in words, for metrics.json and the first lines of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name", "CPU")
    return f"{name}, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's memory that tensors took at most, or of this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):  # Linux, where the peak can be forgotten
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let this process keep the memory that its tensors free, for those of the next step.

    By itself glibc gives it back to the system, which has to find and clear the same pages again at
    every step: on a CPU up to a fifth of full fine-tuning (tests/benchmarks/LOG.md). Other C
    libraries: no change.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Before version 2.35 glibc refuses more than 32 MB and answers 0.
    if mallopt and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Give it back now, so that what comes next has a peak of its own."""
    gc.collect()
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


def forget_peak_memory(device: torch.device) -> None:
    """Begin to measure anew, where the system can; elsewhere the peak is that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
