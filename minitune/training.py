"""The one training loop: accumulation, precision, clipping, schedule, evaluation, checkpoints.

A task brings its batches and its loss (pretraining.py, classification.py); the loop does not look
inside them. What a step computes depends on the seed and the step's number alone, so a run that was
killed and resumed ends with the same bits as one that was not.
"""

import contextlib
import copy
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from statistics import median
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.optimizer import Optimizer, one_cycle
from minitune.support.errors import UserError
from minitune.support.runs import Run
from minitune.support.runtime import Runtime

MAX_GRADIENT_NORM = 1.0
LOG_EVERY = 10  # steps
REPORT_EVERY = 10  # seconds: evaluations of small tasks come faster than anyone reads
PROBE_STEPS, PROBE_SHARE = 100, 0.05  # to measure the speed: steps, or share of the time, at most
EVALUATION_SHARE = 0.2  # of the time, at most
CHECKS, TOLERANCE = 20, 0.05  # of a plan: how often, and by what share it may be off


class Task(Protocol):
    """What the loop needs of a task: MaskedLanguageModelling, Classification.

    Its batches (MaskedBatch, Examples) have `tokens`, how many are read; `len`, the number of
    predictions that the loss is a mean over; `split(parts)`, at most so many shares; and
    `to(device)`, the (inputs, labels) for which `model(*inputs)` has a row of logits a label.
    """

    unit: str  # of a batch's size, "tokens" as a rule
    baseline: str  # what a loss is to be compared with
    evaluations: int  # quick ones, in a run
    # What the weights to be kept have the most of, {"loss", "accuracy"} given; None keeps the last.
    # A task with a score evaluates all rows each time: what was best is not evaluated again.
    score: Callable[[dict], Any] | None

    def batches(self, first_step: int) -> Iterator[Any]:
        """The batch of each step, from `first_step` on."""

    def loss(self, model: nn.Module, inputs: tuple, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(what is minimised, what is reported), summed over the predictions of a batch."""

    def evaluation_due(self, step: int, steps: int) -> bool:
        """Whether to evaluate, quickly, after this many of so many steps."""

    def validation_batches(self, quick: bool) -> list[Any]:
        """The validation rows; if `quick`, a part of them is enough."""


# Attributes of Trainer that a checkpoint holds.
NUMBERS = ("step", "steps", "tokens", "seconds", "earlier_seconds")
NUMBERS += ("validation_every", "best_step", "best_loss", "best_accuracy")


@dataclass(eq=False)
class Trainer:
    """Trains `model` on `task` for `steps` steps, saving checkpoints to `run`."""

    model: nn.Module
    optimizer: Optimizer
    task: Task
    run: Run
    runtime: Runtime
    _: KW_ONLY
    seed: int
    warmup: float = 0.05  # share of all steps
    accumulate: int = 1  # parts in which a batch is computed
    save_minutes: float = 2.0  # between checkpoints

    step, steps, tokens, seconds = 0, 0, 0, 0.0  # how far training has come
    earlier_seconds = 0.0  # of that run, in processes before this one
    validation_every = 1  # 2: of the validation batches every second one is read, and so on
    best_step, best_loss, best_accuracy = 0, 0.0, 0.0  # of all evaluations
    deadline = None  # of time.monotonic(), where steps are planned by time
    last_save = last_report = -math.inf  # so both come at the first step

    def __post_init__(self):
        self.started, self.signals = time.monotonic(), []
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        trained = self.trained.items() if self.task.score else ()
        self.best_weights = {name: p.detach().clone() for name, p in trained}
        # float16 gradients underflow to 0 unless the loss is scaled up (Micikevicius et al. 2018).
        self.scaler = torch.amp.GradScaler(enabled=self.runtime.precision == "fp16")

    def train(self) -> dict:
        """From the current step to the last; returns loss and accuracy on all validation rows.

        Leaves the model with its best weights if the task has a score for them, else with the last.
        Raises KeyboardInterrupt after Ctrl-C, when a checkpoint is saved, and UserError when the
        loss is no longer a number.
        """
        if self.runtime.is_main:
            self.run.rewind_log(self.step)
        options = {"total": self.steps, "initial": self.step, "unit": "step"}
        with catch_signals(self.signals), self.runtime.progress(**options) as bar:
            self.model.train()
            batches = self.task.batches(self.step)
            while self.step < self.steps:
                loss = self._step(next(batches))
                bar.total = self.steps
                bar.set_postfix_str(f"loss {loss:.3f} ({self.task.baseline})")
                bar.update()
            if self.best_step:
                self.load(self.best_weights)
                final = {"loss": self.best_loss, "accuracy": self.best_accuracy}
            else:
                self.runtime.log(f"step {self.step:>6,}: evaluating on all validation rows")
                final = self.evaluate()
            self._check_finite(final["loss"])
            self.save()
            self._stop(self.runtime.sum(torch.tensor(len(self.signals))).item())
        return final

    def _step(self, batch: Any) -> float:
        """One step, and what is due after it; returns the loss."""
        with self._clock():
            loss, norm, signals = self._gradients(batch)
        # Saved between gradients and update: these weights have just given a finite loss.
        if signals or time.monotonic() - self.last_save > 60 * self.save_minutes:
            self.save()
        self._stop(signals)
        with self._clock():
            self._update(norm)
        self.step, self.tokens = self.step + 1, self.tokens + batch.tokens
        if self.deadline and self.step % max(LOG_EVERY, self.steps // CHECKS) == 0:
            self._keep_deadline()
        entry = {"step": self.step, "steps": self.steps, "loss": loss}
        entry["gradient_norm"] = norm if math.isfinite(norm) else None
        entry |= {"tokens": self.tokens, "seconds": round(self.seconds, 2)}
        if evaluated := self.task.evaluation_due(self.step, self.steps):
            entry["validation"] = self._validate()
        due = evaluated or self.step % LOG_EVERY == 0 or self.step == self.steps
        if due and self.runtime.is_main:
            self.run.log(entry)
        return loss

    def _gradients(self, batch: Any) -> tuple[float, float, int]:
        """Fill p.grad: (mean loss, gradient norm before clipping, number of signals to stop)."""
        # Dropout must not depend on where the run was resumed.
        torch.manual_seed((self.seed * 1_000_003 + self.step) * 1009 + self.runtime.rank)
        total = torch.tensor([0.0, len(self.signals)])
        self.scaler.scale(torch.zeros((), device=self.runtime.device))  # a process may have no part
        parts = batch.split(self.runtime.world_size * self.accumulate)
        for part in parts[self.runtime.rank :: self.runtime.world_size]:
            inputs, labels = part.to(self.runtime.device)
            with self.runtime.autocast():
                minimised, reported = self.task.loss(self.model, inputs, labels)
            # Divided by the predictions of the whole batch: parts differ in how many they have.
            self.scaler.scale(minimised / max(len(batch), 1)).backward()
            total[0] += (reported.detach() / max(len(batch), 1)).cpu()
        parameters = list(self.trained.values())
        self.runtime.sum_gradients(parameters)
        loss, signals = self.runtime.sum(total).tolist()
        for optimizer in self.optimizer.parts:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM).item()
        # Scaled float16 gradients may overflow now and then; `_update` skips such a step.
        self._check_finite(loss if self.scaler.is_enabled() else loss + norm)
        return loss, norm, int(signals)

    def _update(self, norm: float) -> None:
        """Update the weights from p.grad, and clear it."""
        self.optimizer.set_rate(one_cycle(self.step, self.steps, self.warmup))
        if math.isfinite(norm):
            for optimizer in self.optimizer.parts:
                self.scaler.step(optimizer)
        self.scaler.update()  # lowers the scale after an overflow
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def _clock(self) -> Iterator[None]:
        """Count this as time of training."""
        started = time.monotonic()
        yield
        self.seconds += time.monotonic() - started

    def _check_finite(self, loss: float) -> None:
        """Raise UserError where nothing can be trained any more."""
        if not math.isfinite(loss):
            saved, folder = self.run.state_path.is_file(), self.run.state_path.parent
            where = f"the last good checkpoint is in {folder}" if saved else "none saved"
            what = f"loss or gradient became {loss} after step {self.step}"
            raise UserError(f"{what}; {where}; try --resume with a lower --lr")

    def _stop(self, signals: int) -> None:
        """Raise KeyboardInterrupt if there was a signal; a checkpoint has been saved."""
        if signals:
            what = f"interrupted: saved at step {self.step:,}"
            self.runtime.log(f"\n{what}; the same command with --resume continues")
            raise KeyboardInterrupt

    def evaluate(self, quick: bool = False) -> dict:
        """`loss` and `accuracy` on validation rows."""
        batches = self.task.validation_batches(quick)[:: self.validation_every]
        return evaluate(self.model, batches, self.runtime)

    def _validate(self) -> dict:
        """Evaluate quickly, keep the weights if they are best, and report; returns the metrics."""
        metrics, score = self.evaluate(quick=True), self.task.score
        best = {"loss": self.best_loss, "accuracy": self.best_accuracy}
        if score and (not self.best_step or score(metrics) > score(best)):
            self.best_step, self.best_loss = self.step, metrics["loss"]
            self.best_accuracy = metrics["accuracy"]
            self.best_weights = {name: p.detach().clone() for name, p in self.trained.items()}
        if time.monotonic() - self.last_report > REPORT_EVERY or self.step == self.steps:
            self.last_report = time.monotonic()
            values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            minutes = (self.steps - self.step) * self.seconds / self.step / 60
            speed = f"{self.tokens / self.seconds:,.0f} {self.task.unit}/s"
            self.runtime.log(
                f"step {self.step:>6,} of {self.steps:,}   validation {values} "
                f"({self.task.baseline})   {speed}   {minutes:.1f} min left"
            )
        return metrics

    def plan(self, deadline: float) -> None:
        """Set `steps` so that they and all evaluations end by `deadline`, of time.monotonic().

        Measured on a copy, so that a run of N steps is the same however N was set. Evaluations that
        would take over EVALUATION_SHARE of the time read an evenly spread part of the rows.
        """
        self.deadline, self.steps, started = deadline, 10**9, time.monotonic()
        mine = self.model.train(), self.trained, self.optimizer, self.scaler
        probe, times, tokens = copy.copy(self), [], 0
        probe.model, probe.trained, probe.optimizer, probe.scaler = copy.deepcopy(mine)
        for batch in itertools.islice(self.task.batches(0), PROBE_STEPS):
            before = time.monotonic()
            _, norm, _ = probe._gradients(batch)
            probe._update(norm)
            times.append(time.monotonic() - before)
            tokens += batch.tokens
            late = time.monotonic() - started > PROBE_SHARE * (deadline - started)
            if self.runtime.broadcast(late and len(times) > 1):
                break
        # The first steps allocate memory and compile kernels.
        pace, tokens = median(times[len(times) // 2 :]), tokens / len(times)
        share = self._evaluation_seconds(pace / tokens) / max(deadline - time.monotonic(), 1e-6)
        self.validation_every = self.runtime.broadcast(max(1, math.ceil(share / EVALUATION_SHARE)))
        if self.validation_every > 1:
            part = f"1 of {self.validation_every:,} validation batches"
            self.runtime.log(f"little time to evaluate: {part} is read")
        self.steps = self._steps_left(pace, tokens)

    def _keep_deadline(self) -> None:
        """Move the end of the run, and of the schedule, where the speed is not what was planned."""
        steps = self.step + self._steps_left(self.seconds / self.step, self.tokens / self.step)
        if abs(steps - self.steps) > TOLERANCE * self.steps:
            self.runtime.log(f"the speed has changed: {steps:,} steps instead of {self.steps:,}")
            self.steps = steps

    def _steps_left(self, pace: float, tokens: float) -> int:
        """How many more steps of so many seconds and tokens fit before the deadline, at least 1."""
        seconds = self.deadline - time.monotonic() - self._evaluation_seconds(pace / tokens)
        return self.runtime.broadcast(max(1, int(seconds / pace)))

    def _evaluation_seconds(self, pace: float) -> float:
        """Of all evaluations to come: a third of the `pace`, the seconds to train on a token."""
        full, quick = (self.task.validation_batches(quick) for quick in (False, True))
        quick_ones = self.task.evaluations * (1 - self.step / self.steps)
        tokens = sum(b.tokens for b in full) + quick_ones * sum(b.tokens for b in quick)
        return tokens / self.validation_every * pace / 3

    def save(self) -> None:
        """Write a checkpoint, from which a run is resumed to the same bits."""
        if self.runtime.is_main:
            self.run.save(self._state())
        self.last_save = time.monotonic()

    def _state(self) -> dict[str, Tensor]:
        """All that training changes, as named tensors; what is frozen is in no checkpoint."""
        numbers = {name: getattr(self, name) for name in NUMBERS}
        numbers["earlier_seconds"] += time.monotonic() - self.started
        parts = {"model": self.trained, "best": self.best_weights}
        parts["optimizer"] = self.optimizer.state()
        for part, values in (("numbers", numbers), ("scaler", self.scaler.state_dict())):
            parts[part] = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
        return {f"{part}/{name}": t for part, state in parts.items() for name, t in state.items()}

    @torch.no_grad()
    def restore(self, checkpoint: dict[str, Tensor]) -> None:
        """Continue from what `save` wrote. UserError where this run cannot have written it."""
        damaged, state = f"{self.run.state_path} is damaged, or of another run", self._state()
        # The scaler alone depends on --precision, which may change.
        scaler = {k: checkpoint.get(k, t) for k, t in state.items() if k.startswith("scaler/")}
        checkpoint = scaler | {k: t for k, t in checkpoint.items() if not k.startswith("scaler/")}
        mine, theirs = (
            {(name, t.dtype, t.shape) for name, t in x.items()} for x in (state, checkpoint)
        )
        for name, *_ in sorted(mine ^ theirs, key=str):
            raise UserError(f"{damaged}: the tensor {name[:99]}")
        found = {name: checkpoint[f"numbers/{name}"].item() for name in NUMBERS}
        # Of the right types, and without the impossible.
        numbers = {k: type(getattr(self, k))(x) for k, x in found.items() if 0 <= x < 2**53}
        if numbers != found or not self._is_possible(**numbers):
            raise UserError(f"{damaged}: " + ", ".join(f"{k} {x:g}" for k, x in found.items()))
        for name, value in numbers.items():
            setattr(self, name, value)
        for name, tensor in state.items():
            tensor.copy_(checkpoint[name])
        if scaler:
            values = {name: state[f"scaler/{name}"].item() for name in self.scaler.state_dict()}
            self.scaler.load_state_dict(values)
        self.last_save = time.monotonic()

    def _is_possible(
        self, step: int, steps: int, seconds: float, validation_every: int, best_step: int, **_
    ) -> bool:
        """Whether this run can have come to these numbers."""
        if not (step <= steps == (self.steps or steps) and steps and seconds and validation_every):
            return False
        evaluated = range(1, step + 1) if self.task.score else ()
        return best_step in ([s for s in evaluated if self.task.evaluation_due(s, steps)] or [0])

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Give everything that is trained these values."""
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Any], runtime: Runtime) -> dict:
    """Mean `loss` in nats and `accuracy` over all predictions; processes share the batches."""
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)  # loss, right answers, answers
    mine = batches[runtime.rank :: runtime.world_size]
    with runtime.autocast():  # one context, so that it casts weights only once
        for batch in runtime.progress(mine, desc="evaluation", leave=False):
            inputs, labels = batch.to(runtime.device)
            logits = model(*inputs).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            right = (logits.argmax(-1) == labels).sum()
            totals += torch.tensor([loss.item(), right.item(), len(batch)], dtype=torch.float64)
    model.train(was_training)
    loss, right, answers = runtime.sum(totals).tolist()
    return {"loss": loss / max(answers, 1), "accuracy": right / max(answers, 1)}


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
