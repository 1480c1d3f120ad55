"""The machine a run is on: its device in words, and its memory."""

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

from minitune.errors import UserError


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

    By itself glibc gives it back to the system, which has to find and clear the same pages again at every
    step: on a CPU up to a fifth of full fine-tuning (tests/benchmarks/LOG.md). Other C libraries: no change.
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
