"""The one training loop: precision, accumulation, clipping, schedule, resume.

A task brings its batches and its loss (pretraining.py); the loop does not look inside them. What a
step computes depends on the seed and the step's number alone, so a run that was killed and resumed
ends with the same bits as one that was not.
"""

import contextlib
import copy
import itertools
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minitune.optimizer import Optimizer, one_cycle
from minitune.support.errors import UserError
from minitune.support.runs import Run
from minitune.support.runtime import Runtime

MAX_GRADIENT_NORM = 1.0
LOG_EVERY = 10  # steps
REHEARSAL_STEPS = 4  # at least
REHEARSAL_SHARE = 0.02  # of the time that is left, twice: to warm up, and to measure


class Batch(Protocol):
    """pretraining.MaskedBatch, classification.Examples."""

    tokens: int  # that are read

    def __len__(self) -> int:
        """How many predictions the loss is a mean over."""

    def split(self, parts: int) -> list["Batch"]:
        """At most so many shares of it, for accumulation and for several processes."""

    def to(self, device: torch.device) -> tuple[tuple, Tensor]:
        """(inputs, labels) on a device: `model(*inputs)` gives one row of logits a label."""


class Task(Protocol):
    """What the loop needs of a task. A batch has `len`, `tokens`, `split` and `to` (see Batch)."""

    validation_tokens: int  # read by one full evaluation and all quick ones of a run
    baseline: str  # what a loss is to be compared with
    unit: str  # of a batch's size, "tokens" as a rule

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The batch of each step, from `first_step` on."""

    def loss(self, model: nn.Module, inputs: tuple, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(what is minimised, what is reported), summed over the predictions of a batch."""

    def evaluation_due(self, step: int, steps: int) -> bool:
        """Whether to evaluate, quickly, after this many of so many steps."""

    def validation_batches(self, quick: bool) -> list[Batch]:
        """The validation rows; if `quick`, a part of them is enough."""

    def score(self, metrics: dict) -> Any:
        """If the weights with the best score are to be kept at the end, that; None keeps the last.

        A task that scores evaluates all rows each time, quickly or not: what was best is not
        evaluated again.
        """


class Trainer:
    """Trains `model` on `task` for a fixed number of steps, saving to `run` now and then."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        task: Task,
        run: Run,
        runtime: Runtime,
        *,
        seed: int,
        warmup: float = 0.05,
        accumulate: int = 1,
        save_minutes: float = 2.0,
    ):
        self.model, self.optimizer, self.task, self.run = model, optimizer, task, run
        self.runtime = runtime
        self.seed, self.warmup, self.accumulate = seed, warmup, accumulate
        self.save_seconds = 60 * save_minutes
        # float16 gradients underflow to zero unless the loss is scaled up (Micikevicius et al.
        # 2018).
        self.scaler = torch.amp.GradScaler(enabled=runtime.precision == "fp16")
        self.step, self.steps, self.seconds, self.tokens = 0, 0, 0.0, 0
        self.last_save = (
            -math.inf
        )  # so a checkpoint is written at the first step, to go back to after a NaN
        self.interrupts = Interrupts()
        self.reporter = Reporter(task.unit, task.baseline, speaks=runtime.is_main)
        # Of the best evaluation so far: {"score", "step", "metrics"}, and what was trained.
        self.best: dict = {}
        self.best_weights: dict[str, Tensor] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return list(self.trained().values())

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name. Frozen weights are in no checkpoint."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def plan(self, deadline: float) -> int:
        """How many steps fit in before `deadline` (of time.monotonic), evaluations included.

        Measured on a copy that is thrown away, so that a run of N steps is the same however N was
        set.
        """
        rehearsal = copy.copy(self)
        originals = self.model, self.optimizer, self.scaler
        rehearsal.model, rehearsal.optimizer, rehearsal.scaler = copy.deepcopy(originals)
        rehearsal.model.train()
        rehearsal.steps, batches = 1, self.task.batches(0)

        def take_steps(count: int) -> tuple[float, int]:
            """Train for so many steps: (seconds a step, tokens a step)."""
            started, tokens = time.monotonic(), 0
            for batch in itertools.islice(batches, count):
                _, norm, _ = rehearsal._gradients(batch)
                rehearsal._apply(norm)
                tokens += batch.tokens
            return (time.monotonic() - started) / count, tokens / count

        # The first steps allocate memory, and compile kernels for batches of many shapes.
        seconds, _ = take_steps(REHEARSAL_STEPS)
        count = max(REHEARSAL_STEPS, int(REHEARSAL_SHARE * (deadline - time.monotonic()) / seconds))
        count = self.runtime.broadcast(count)
        take_steps(count)
        seconds, tokens = take_steps(count)
        # Evaluation is a forward pass, a third of the work of a step.
        evaluations = self.task.validation_tokens * seconds / tokens / 3
        steps = (deadline - time.monotonic() - evaluations) / seconds
        return self.runtime.broadcast(max(int(steps), 1))

    def restore(self, tensors: dict[str, Tensor], progress: dict) -> None:
        """Go on from a checkpoint of `save`."""
        parts = {"model": {}, "optimizer": {}, "best": {}}
        for name, tensor in tensors.items():
            part, _, name = name.partition("/")
            parts[part][name] = tensor
        self.load(parts["model"])
        self.best = progress["best"]
        self.best_weights = {n: t.to(self.runtime.device) for n, t in parts["best"].items()}
        for name, tensor in self.optimizer.state().items():
            tensor.copy_(parts["optimizer"][name])
        if progress["scaler"]:
            self.scaler.load_state_dict(progress["scaler"])
        self.step, self.steps = progress["step"], progress["steps"]
        self.seconds, self.tokens = progress["seconds"], progress["tokens"]
        self.last_save = time.monotonic()

    def save(self) -> None:
        """Write a checkpoint from which `restore` goes on to the same bits."""
        if self.runtime.is_main:
            tensors = {f"model/{name}": tensor for name, tensor in self.trained().items()}
            state = self.optimizer.state().items()
            tensors |= {f"optimizer/{name}": tensor for name, tensor in state}
            tensors |= {f"best/{name}": tensor for name, tensor in self.best_weights.items()}
            progress = {"step": self.step, "steps": self.steps, "seconds": self.seconds}
            progress |= {
                "tokens": self.tokens,
                "scaler": self.scaler.state_dict(),
                "best": self.best,
            }
            self.run.save(tensors, progress)
        self.last_save = time.monotonic()

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Give everything that is trained these values."""
        for name, parameter in self.trained().items():
            parameter.copy_(weights[name])

    def train(self) -> dict:
        """From the current step to the last; returns the metrics on all validation rows.

        Leaves the model with its best weights if the task has a score for them, else with the last.

        Raises Interrupted after Ctrl-C, and UserError when the loss is no number any more.
        """
        with self.interrupts, self.reporter.bar(self.step, self.steps):
            self.model.train()
            batches = self.task.batches(self.step)
            while self.step < self.steps:
                self._step(batches)
        if self.best:
            self.load(self.best_weights)
        final = self.best.get("metrics") or self.evaluate()
        self._check(final["loss"])
        self.save()
        if self.runtime.sum(torch.tensor([float(self.interrupts.asked)])) > 0:
            raise Interrupted  # asked for during the last step; nothing is left but to write the results
        return final

    def _step(self, batches: Iterator[Any]) -> None:
        with self._clock():
            batch = next(batches)
            loss, norm, stop = self._gradients(batch)
        # Saved between gradients and update: these weights have just given a finite loss.
        if stop or time.monotonic() - self.last_save > self.save_seconds:
            self.save()
        if stop:
            raise Interrupted
        with self._clock():
            self._apply(norm)
        self.step += 1
        self.tokens += batch.tokens
        entry = {
            "step": self.step,
            "loss": loss,
            "gradient_norm": norm if math.isfinite(norm) else None,
        }
        entry |= {"tokens": self.tokens, "seconds": round(self.seconds, 2)}
        if self.task.evaluation_due(self.step, self.steps):
            self._validate(entry)
        due = self.step % LOG_EVERY == 0 or "validation" in entry or self.step == self.steps
        if due and self.runtime.is_main:
            self.run.log(entry)
        self.reporter.advance(loss, self.tokens / self.seconds)

    def _gradients(self, batch: Any) -> tuple[float, float, bool]:
        """Fill p.grad: (mean loss, gradient norm before clipping, whether to stop here)."""
        # Dropout must not depend on where the run was resumed.
        torch.manual_seed((self.seed * 1_000_003 + self.step) * 1009 + self.runtime.rank)
        total = torch.zeros(2)  # loss, and how many processes were asked to stop
        self.scaler.scale(
            torch.zeros((), device=self.runtime.device)
        )  # wakes a scaler without parts
        parts = batch.split(self.runtime.world_size * self.accumulate)
        for part in parts[self.runtime.rank :: self.runtime.world_size]:
            inputs, labels = part.to(self.runtime.device)
            with self.runtime.autocast():
                minimised, reported = self.task.loss(self.model, inputs, labels)
            # Over the predictions of the whole batch: parts differ in how many they have, and
            # a mean of their means would weigh them wrongly.
            self.scaler.scale(minimised / max(len(batch), 1)).backward()
            total[0] += (reported.detach() / max(len(batch), 1)).cpu()
        total[1] = self.interrupts.asked
        self.runtime.sum_gradients(self.parameters)
        loss, stop = self.runtime.sum(total).tolist()
        for optimizer in self.optimizer.parts:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM).item()
        # Scaled float16 gradients may overflow now and then; the step is skipped and the scale
        # lowered.
        self._check(loss if self.scaler.is_enabled() else loss + norm)
        return loss, norm, stop > 0

    def _check(self, loss: float) -> None:
        """Stop where there is nothing left to train."""
        if not math.isfinite(loss):
            saved = self.run.state_path.is_file()
            where = (
                f"the last good checkpoint is in {self.run.state_path.parent}"
                if saved
                else "none saved"
            )
            what = f"loss or gradient became {loss} after step {self.step}"
            raise UserError(f"{what}; {where}; try --resume with a lower --lr")

    def _apply(self, norm: float) -> None:
        """Update the weights from p.grad, and clear it."""
        self.optimizer.set_rate(one_cycle(self.step, self.steps, self.warmup))
        if math.isfinite(norm):  # else float16 overflowed: skip every part, not only the one it hit
            for optimizer in self.optimizer.parts:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def evaluate(self, quick: bool = False) -> dict:
        """The task's metrics on validation rows."""
        batches = self.task.validation_batches(quick)
        return evaluate(self.model, batches, self.runtime)

    def _validate(self, entry: dict) -> None:
        """Evaluate, add that to an entry of the log, and keep these weights if they are the best."""
        entry["validation"] = metrics = self.evaluate(quick=True)
        minutes_left = (self.steps - self.step) * self.seconds / self.step / 60
        self.reporter.report(self.step, metrics, self.tokens / self.seconds, minutes_left)
        score = self.task.score(metrics)
        if score is not None and (not self.best or list(score) > self.best["score"]):
            self.best = {"score": list(score), "step": self.step, "metrics": metrics}
            self.best_weights = {name: p.detach().clone() for name, p in self.trained().items()}

    @contextlib.contextmanager
    def _clock(self) -> Iterator[None]:
        """Count this as time of training."""
        started = time.monotonic()
        yield
        self.seconds += time.monotonic() - started


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Batch], runtime: Runtime) -> dict:
    """Mean `loss` in nats and `accuracy` over all predictions; processes share the batches."""
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)  # loss, right answers, answers
    with runtime.autocast():  # one context, so that it casts weights only once
        for batch in batches[runtime.rank :: runtime.world_size]:
            inputs, labels = batch.to(runtime.device)
            logits = model(*inputs).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            right = (logits.argmax(-1) == labels).sum()
            totals += torch.tensor([loss.item(), right.item(), len(batch)], dtype=torch.float64)
    model.train(was_training)
    loss, right, answers = runtime.sum(totals).tolist()
    return {"loss": loss / max(answers, 1), "accuracy": right / max(answers, 1)}


def train_or_say_how_to_go_on(trainer: Trainer, out: Path) -> dict:
    """`trainer.train()`, with the log as it was at the trainer's step; `out` is the script's --out."""
    if trainer.runtime.is_main:
        trainer.run.rewind_log(trainer.step)
    try:
        return trainer.train()
    except Interrupted:
        done = f"saved at step {trainer.step:,}"
        trainer.runtime.log(f"\ninterrupted: {done}; go on with --resume --out {out}")
        raise


REPORT_EVERY = 10  # seconds: small tasks have evaluations faster than anyone reads


class Reporter:
    """A bar where there is a terminal, and lines with the validation metrics, which a log file gets too."""

    def __init__(self, unit: str, baseline: str, speaks: bool):
        """`unit` of a batch's size; `baseline`, what a loss is to be compared with; one process speaks."""
        self.unit, self.baseline, self.speaks = unit, baseline, speaks
        self.last_report = -math.inf

    @contextlib.contextmanager
    def bar(self, step: int, steps: int) -> Iterator[None]:
        """Show a bar over so many steps, the first ones of which are done."""
        self.steps = steps
        # None: only where there is a terminal.
        disable = None if self.speaks else True
        with tqdm(
            total=steps, initial=step, unit="step", dynamic_ncols=True, disable=disable
        ) as self._bar:
            yield

    def advance(self, loss: float, speed: float) -> None:
        """One step is done; `speed` in units a second."""
        self._bar.update()
        self._bar.set_postfix_str(f"loss {loss:.3f} ({self.baseline}), {speed:,.0f} {self.unit}/s")

    def report(self, step: int, metrics: dict, speed: float, minutes_left: float) -> None:
        """A line for people, not more often than they can read, and one at the end."""
        due = time.monotonic() - self.last_report > REPORT_EVERY or step == self.steps
        if not due or not self.speaks:
            return
        self.last_report = time.monotonic()
        values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        line = f"step {step:>6,} of {self.steps:,}   validation {values} ({self.baseline})"
        line += f"   {speed:,.0f} {self.unit}/s   {minutes_left:.1f} min left"
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the checkpoint was saved."""


class Interrupts:
    """Within this context the first Ctrl-C only sets `asked`; the second ends the program at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Interrupts":
        handled = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self._ask) for number in handled}
        return self

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
