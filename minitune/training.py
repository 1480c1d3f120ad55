"""The one training loop: precision, accumulation, clipping, schedule, progress, resume.

A task brings its batches and its loss (pretraining.py); the loop knows nothing of either. What a step
computes depends on the seed and the step's number alone, so a run that was killed and resumed ends
with the same bits as one that was not.
"""

import contextlib
import copy
import math
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minitune.errors import UserError
from minitune.optimizer import Optimizer, one_cycle
from minitune.processes import Processes
from minitune.runs import Run

MAX_GRADIENT_NORM = 1.0
LOG_EVERY = 10  # steps
EVALUATIONS = 12  # quick ones, over a run
REHEARSAL_STEPS = 8


class Task(Protocol):
    """What the loop asks of a task. A batch has `len`, `split` and `to`; see pretraining.Cloze."""

    validation_tokens: int

    def batches(self, first_step: int) -> Iterator[Any]:
        """The batch of each step, from `first_step` on."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Summed, not averaged, over the predictions of a batch."""

    def evaluate(self, model: nn.Module, processes: Processes, quick: bool = False) -> dict:
        """Metrics on validation rows; `quick` on a part of them."""


@dataclass
class Precision:
    """How the model computes: "fp32", "bf16" or "fp16" (mixed, by autocast; weights stay float32)."""

    name: str
    why: str = "as asked"

    @classmethod
    def choose(cls, asked: str, device: torch.device) -> "Precision":
        """`auto` is bf16 where the hardware multiplies it, else fp32."""
        if asked == "fp16" and device.type == "cpu":
            raise UserError("--precision fp16 needs a CUDA device; on a CPU use bf16 or fp32")
        if asked != "auto":
            return cls(asked)
        if device.type == "cuda":
            has, where = torch.cuda.is_bf16_supported(including_emulation=False), "this GPU"
        else:
            abilities = torch.cpu.get_capabilities()
            has = any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
            where = "this processor"
        return cls("bf16" if has else "fp32", f"{where} {'has' if has else 'has no'} bf16 products")

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return names[self.name]

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The context to run forward passes in."""
        return torch.autocast(device.type, self.dtype, enabled=self.name != "fp32")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the checkpoint was saved."""


class Trainer:
    """Trains `model` on `task` for a fixed number of steps, saving to `run` now and then."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        task: Task,
        run: Run,
        processes: Processes,
        precision: Precision,
        *,
        seed: int,
        accumulate: int = 1,
        save_minutes: float = 2.0,
    ):
        self.model, self.optimizer, self.task, self.run = model, optimizer, task, run
        self.processes, self.precision = processes, precision
        self.seed, self.accumulate, self.save_seconds = seed, accumulate, 60 * save_minutes
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # float16 gradients underflow to zero unless the loss is scaled up (Micikevicius et al. 2018).
        self.scaler = torch.amp.GradScaler(enabled=precision.name == "fp16")
        self.step, self.steps, self.seconds, self.tokens = 0, 0, 0.0, 0
        self.interrupted = False

    def plan(self, minutes_left: float) -> int:
        """How many steps fit into the time, evaluations included. Measured on copies, then fixed."""
        model, optimizer = self.model, self.optimizer
        self.model = copy.deepcopy(model)
        self.optimizer = optimizer.for_copy(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.steps, tokens = 1, []
        for i, batch in zip(range(REHEARSAL_STEPS), self.task.batches(0), strict=False):
            if i == REHEARSAL_STEPS // 2:  # the first ones compile kernels and allocate memory
                started = time.monotonic()
            self._update(batch)
            tokens.append(batch.batch.tokens.numel())
        seconds = (time.monotonic() - started) / (REHEARSAL_STEPS - REHEARSAL_STEPS // 2)
        # An evaluation is a forward pass, a third of a step for each of its tokens.
        full = self.task.validation_tokens / (sum(tokens) / len(tokens)) * seconds / 3
        evaluations = full * (1 + EVALUATIONS / 8)
        self.model, self.optimizer = model, optimizer
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        steps = int((60 * minutes_left - evaluations) / seconds)
        return self.processes.agree(max(steps, 1))

    def restore(self, tensors: dict[str, Tensor], progress: dict) -> None:
        """Go on from a checkpoint of `save`."""
        model = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
        self.model.load_state_dict(model)
        self.optimizer.load_state(
            {n.removeprefix("optimizer/"): t for n, t in tensors.items() if n.startswith("optimizer/")}
        )
        self.scaler.load_state_dict(progress["scaler"])
        self.step, self.steps = progress["step"], progress["steps"]
        self.seconds, self.tokens = progress["seconds"], progress["tokens"]

    def save(self) -> None:
        """Write a checkpoint from which `restore` goes on to the same bits."""
        if self.processes.is_main:
            tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
            state = self.optimizer.state().items()
            tensors |= {f"optimizer/{name}": tensor for name, tensor in state}
            progress = {"step": self.step, "steps": self.steps, "seconds": self.seconds}
            progress |= {"tokens": self.tokens, "scaler": self.scaler.state_dict()}
            self.run.save(tensors, progress)
        self.last_save = time.monotonic()

    def train(self) -> None:
        """From the current step to the last. Raises Interrupted, or UserError on a NaN."""
        with self._catching_interrupts():
            self._train()

    def _train(self) -> None:
        self.model.train()
        self.save()
        bar = tqdm(total=self.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=None)
        evaluate_every = max(1, self.steps // EVALUATIONS)
        for batch in self.task.batches(self.step):
            if self.step >= self.steps:
                break
            started = time.monotonic()
            loss, norm, stop = self._update(batch)
            self.step += 1
            self.seconds += time.monotonic() - started
            self.tokens += batch.batch.tokens.numel()
            entry = {"step": self.step, "loss": loss, "gradient_norm": norm, "tokens": self.tokens}
            entry["seconds"] = round(self.seconds, 2)
            if self.step % evaluate_every == 0 and self.step < self.steps and not stop:
                entry["validation"] = self.evaluate(quick=True)
                self._report(entry, bar)
            if self.processes.is_main and (
                self.step % LOG_EVERY == 0 or "validation" in entry or self.step == self.steps
            ):
                self.run.log(entry)
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {self.tokens / self.seconds:,.0f} tokens/s")
            if stop:
                self.save()
                raise Interrupted
            if time.monotonic() - self.last_save > self.save_seconds:
                self.save()
        bar.close()
        self.save()

    def _update(self, batch: Any) -> tuple[float, float, bool]:
        """One optimizer step: (mean loss, gradient norm before clipping, whether to stop after it)."""
        # Dropout must not depend on where the run was resumed.
        torch.manual_seed((self.seed * 1_000_003 + self.step) * 1009 + self.processes.rank)
        total = torch.zeros(2)  # loss, and how many processes were asked to stop
        parts = batch.split(self.processes.count * self.accumulate)
        for part in parts[self.processes.rank :: self.processes.count]:
            part = part.to(self.processes.device)
            with self.precision.autocast(self.processes.device):
                # Over the predictions of the whole batch: parts differ in how many they have, and
                # a mean of their means would weigh them wrongly.
                loss = self.task.loss(self.model, part) / max(len(batch), 1)
            self.scaler.scale(loss).backward()
            total[0] += loss.detach().cpu()
        total[1] = self.interrupted
        self._sum_gradients()
        loss, stop = self.processes.sum(total).tolist()

        for optimizer in self.optimizer.parts:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM).item()
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise UserError(
                f"the loss is {loss} and the gradient norm {norm} in step {self.step + 1}: stopped "
                f"before it reached the weights; the last good checkpoint is in "
                f"{self.run.state_path.parent}; try --resume with a lower --lr"
            )
        self.optimizer.set_rate(one_cycle(self.step, self.steps))
        for optimizer in self.optimizer.parts:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss, norm, stop > 0

    def _sum_gradients(self) -> None:
        """Add up the gradients of all processes, in one message."""
        if self.processes.count == 1:
            return
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = self.processes.sum(torch.cat([p.grad.flatten() for p in self.parameters]))
        for p, grad in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            p.grad.copy_(grad.view_as(p))

    def evaluate(self, quick: bool = False) -> dict:
        """The task's metrics on validation rows."""
        self.model.eval()
        with self.precision.autocast(self.processes.device):
            metrics = self.task.evaluate(self.model, self.processes, quick)
        self.model.train()
        return metrics

    def _report(self, entry: dict, bar: tqdm) -> None:
        """One line for people. tqdm's bar is for terminals; a log file gets only these lines."""
        if self.processes.is_main:
            speed = self.tokens / self.seconds
            left = (self.steps - self.step) * self.seconds / self.step / 60
            validation = ", ".join(f"{k} {v:.3f}" for k, v in entry["validation"].items())
            line = f"step {self.step:>6,} of {self.steps:,}   loss {entry['loss']:.3f}"
            line += f"   validation {validation}   {speed:,.0f} tokens/s   {left:.1f} min left"
            bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    @contextlib.contextmanager
    def _catching_interrupts(self) -> Iterator[None]:
        """The first Ctrl-C ends the run after the current step; the second ends it at once."""

        def handle(number, frame):
            self.interrupted = True
            signal.signal(number, signal.default_int_handler)

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's memory that tensors took at most, or of this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
