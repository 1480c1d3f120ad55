"""What a program runs on: device, precision, processes, memory; and its lines and progress bars.

`torchrun --nproc-per-node N train.py` starts N processes, else there is one. Each computes a share
of every batch, gradients are summed, and only the main process writes and prints.
"""

import contextlib
import ctypes
import functools
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from minitune.fast.compiled import compile_layers, warm_up
from minitune.fast.prefetch import prefetch
from minitune.support.errors import UserError, plural

# Compiling takes 5 to 30 s, and makes a step on an H100 6% (tiny) to 19% (base) faster.
COMPILE_MINUTES = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Where and how a program computes. Each program makes one, by `Runtime.start`."""

    device: torch.device
    precision: str  # of matrix multiplications: "fp32", "bf16" or "fp16"
    precision_reason: str = "--precision"  # why this one
    rank: int = 0  # of this process
    world_size: int = 1  # how many processes there are

    @classmethod
    def start(
        cls, device: str = "auto", precision: str = "auto", threads: int | None = None
    ) -> "Runtime":
        """Choose device ("auto", "cpu" or "cuda") and precision, and join the other processes.

        "auto" is a GPU if there is one, and bf16 where the hardware is faster with it, else fp32.
        `threads` is for the processor; None leaves that to torch. Raises UserError for what this
        machine cannot do.
        """
        if threads:
            torch.set_num_threads(threads)
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device here")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if precision == "fp16" and device == "cpu":
            raise UserError("--precision fp16 needs a CUDA device; on a CPU use bf16 or fp32")
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world_size > 1:
            backend = "gloo" if device == "cpu" else "nccl"
            if device == "cuda":
                device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(device)
            # The others wait while the main process tokenises, and a large corpus takes hours.
            dist.init_process_group(backend, timeout=timedelta(days=1))
        device, reason = torch.device(device), "--precision"
        if precision == "auto":
            precision = "bf16" if multiplies_bf16(device) else "fp32"
            where = "this GPU" if device.type == "cuda" else "this processor"
            reason = f"{where} has {'' if precision == 'bf16' else 'no fast '}bf16 multiplication"
        return cls(device, precision, reason, rank, world_size)

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix multiplications."""
        return DTYPES[self.precision]

    def autocast(self) -> torch.autocast:
        """The context for forward passes. Weights that train, LayerNorm and loss stay float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.precision != "fp32")

    def cast_frozen(self, module: nn.Module) -> None:
        """Convert the frozen linear maps of a module to `dtype`.

        Autocast computes the same, but converts them again for every batch.
        """
        linear = (m for m in module.modules() if isinstance(m, nn.Linear))
        for p in (p for m in linear for p in m.parameters() if not p.requires_grad):
            p.data = p.data.to(self.dtype)

    def compiles(self, choice: str, attention: str, minutes: float = 0) -> bool:
        """Whether the layers are compiled for training: by --compile ("auto", "on" or "off").

        "auto": on a GPU with attention by Triton, in a run that is planned for so many minutes that
        the time to compile comes back. Raises UserError if "on" cannot be.
        """
        possible = self._can_be_traced(attention)
        if choice == "on" and not possible:
            raise UserError("--compile on needs a CUDA device and --attention triton")
        return possible and (choice == "on" or choice == "auto" and minutes >= COMPILE_MINUTES)

    def repeats_graphs(self, choice: str, attention: str, accumulate: int) -> bool:
        """Whether training steps are recorded as CUDA graphs: by --cuda-graphs ("auto" or "off").

        "auto": on a GPU with attention by Triton, where each step is one part of one process.
        """
        one = self.world_size == accumulate == 1 and self.precision != "fp16"  # which has a scaler
        return choice == "auto" and one and self._can_be_traced(attention)

    def _can_be_traced(self, attention: str) -> bool:
        """Whether a step reads no length of a text on the processor."""
        return self.device.type == "cuda" and attention == "triton"

    def compile_layers(self, bert: nn.Module, max_len: int, batch_tokens: int) -> None:
        """Compile the layers of a `Bert` for training with such batches."""
        # Imported here, since it takes seconds.
        from torch._dynamo.exc import TorchDynamoException

        started = time.monotonic()
        torch.compiler.reset()  # it keeps eight programs; those of an earlier model would count
        compile_layers(bert)
        try:
            warm_up(bert, max_len, batch_tokens // self.world_size, self.autocast())
        except TorchDynamoException as error:
            reason = " ".join(str(error).split("\n")[:2])
            raise UserError(f"compiling the layers failed ({reason}); try --compile off") from error
        self.log(f"compiled the layers in {time.monotonic() - started:.0f} s")

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def log(self, line: str) -> None:
        """Print a line on the main process, above any progress bar."""
        try:
            if self.is_main:
                with tqdm.external_write_mode(file=sys.stdout):
                    print(line, flush=True)
        except OSError:  # `| head -1`, a full disk: the work continues without lines
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def progress(self, items: Iterable | None = None, **options) -> tqdm:
        """The items with a progress bar, where the main process has a terminal."""
        return tqdm(items, dynamic_ncols=True, disable=None if self.is_main else True, **options)

    def describe(self) -> str:
        """The device in words, for metrics.json and the first lines of a run."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        name = torch.cpu.get_capabilities().get("cpu_name", "CPU")
        return f"{name}, {plural(torch.get_num_threads(), 'thread')}"

    def describe_precision(self) -> str:
        """The precision, and why."""
        return f"{self.precision} ({self.precision_reason})"

    def describe_ways(self, attention: str, compiles: bool) -> str:
        """How it computes, for the first lines of a run."""
        layers = f"attention: {attention}; compile: {'on' if compiles else 'off'}"
        return f"precision: {self.describe_precision()}; {layers}"

    def shares(
        self, batches: Iterator[Any], accumulate: int, prepare: Callable = lambda part: part
    ) -> Iterator[tuple[Any, list]]:
        """Each batch with the parts of it that this process computes, `accumulate` at most.

        A part is (inputs, labels) on the device, after `prepare`. Those for a GPU are made while it
        computes.
        """

        def with_parts(batch: Any) -> tuple[Any, list]:
            parts = batch.split(self.world_size * accumulate)[self.rank :: self.world_size]
            return batch, [prepare(part).to(self.device) for part in parts]

        shares = map(with_parts, batches)
        return prefetch(shares) if self.device.type == "cuda" else shares

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of this tensor over all processes, in place."""
        if self.world_size > 1:
            moved = tensor.to(self.device)  # NCCL sums on the GPU only
            dist.all_reduce(moved)
            tensor.copy_(moved)
        return tensor

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in one message."""
        if self.world_size == 1:
            return
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = self.sum(torch.cat([p.grad.flatten() for p in parameters]))
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on every process."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.broadcast(None)

    def close(self) -> None:
        """Leave the other processes."""
        if self.world_size > 1:
            dist.destroy_process_group()

    def peak_memory(self) -> int:
        """The peak in bytes of what the process takes, of a GPU or of the main memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        with contextlib.suppress(OSError, IndexError):  # Linux, where the peak can be reset
            return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def reset_peak_memory(self) -> None:
        """Measure the peak from this moment on, where the system can do that."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


@contextlib.contextmanager
def catch_signals(caught: list[int]) -> Iterator[None]:
    """Put the first Ctrl-C, or SIGTERM, into the list; a second one ends the program at once."""

    def note(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@functools.cache
def multiplies_bf16(device: torch.device) -> bool:
    """Whether this hardware multiplies bfloat16 matrices faster than float32 ones.

    Processors without such instructions emulate them. Those of Intel that have AVX-512 BF16 but not
    AMX are half as fast with it (tests/benchmarks/LOG.md).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    abilities = torch.cpu.get_capabilities()
    vectors = abilities.get("avx512_bf16") and "Intel" not in abilities.get("cpu_name", "")
    return any((abilities.get("amx_bf16"), vectors, abilities.get("bf16")))


def return_freed_memory() -> None:
    """Return freed memory to the system, so that it does not count in the next training's peak."""
    gc.collect()
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for the tensors of the next step.

    By default glibc returns it to the system, which clears it and gives it back at the next step.
    On a CPU that is up to a fifth of the time of full fine-tuning (tests/benchmarks/LOG.md). With
    other C libraries nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Before version 2.35 glibc refuses more than 32 MB and answers 0.
    if mallopt and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
