"""The one training loop, for pretraining and for every way of fine-tuning.

    batch -> loss -> backward pass -> clip -> optimizer step -> log, evaluate, save

What a step computes depends only on the seed and on the step's number. So a run that was killed and
resumed ends with the same bits as one that was not.

The loop knows nothing of what is learned. That is in a task, MaskedLanguageModelling,
Classification or both together (second_task.py), which has

    batches(first_step)         the batch of each step from `first_step` on, without end
    loss(model, inputs, labels) (loss to minimise, loss to report), summed over the predictions
    evaluation_due(step, steps) whether to evaluate after this step
    validation_batches(quick)   all validation rows; if `quick`, a part of them is enough
    score(metrics)              the weights with the highest score are kept; a task whose `score` is
                                None keeps the last ones
    start_counts                whether the weights before the first step may have the highest score
    unit, baseline              what `tokens` below counts, and losses to compare with, as text

and in its batches, such as MaskedBatch or Examples, which have

    tokens                      how many tokens the model reads
    len(batch)                  the number of predictions; the loss is their mean
    split(parts)                up to that many smaller batches, none of them empty
    to(device)                  (inputs, labels), as `loss` takes them; with a validation batch
                                model(*inputs) gives one row of logits for each label
"""

import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.fast.graphs import Graphs
from minitune.optimizer import Optimizer, one_cycle
from minitune.support.errors import UserError
from minitune.support.plan import RECENT_STEPS, keep_deadline, report_progress
from minitune.support.runs import Run
from minitune.support.runtime import Runtime, catch_signals

MAX_GRADIENT_NORM = 1.0
LOG_EVERY = 10  # steps
REPORT_EVERY = 10  # seconds at least; small tasks are evaluated more often than anyone reads
SILENCE = 60  # seconds at most, where there is no terminal for a progress bar
# The attributes of Trainer that a checkpoint holds as numbers.
NUMBERS = ("step", "steps", "tokens", "seconds", "earlier_seconds")
NUMBERS += ("validation_every", "best_step", "best_loss", "best_accuracy")


class Trainer:
    """Trains `model` on `task`, and saves checkpoints to `run`. The caller sets `steps`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        task: Any,
        run: Run,
        runtime: Runtime,
        *,
        seed: int,
        warmup: float = 0.05,
        accumulate: int = 1,
        save_minutes: float = 2.0,
        graphs: bool = False,
    ):
        """`warmup` is a share of all steps, `accumulate` the parts that a batch is computed in.

        `graphs`: a GPU repeats recorded steps (fast/graphs.py).
        """
        self.model, self.optimizer, self.task, self.run = model, optimizer, task, run
        self.runtime, self.seed, self.warmup = runtime, seed, warmup
        self.accumulate, self.save_minutes, self.graphs = accumulate, save_minutes, graphs
        self.step = self.steps = self.tokens = 0  # steps done, steps in all, tokens trained on
        self.seconds = 0.0  # of training, without evaluations
        self.started, self.earlier_seconds = time.monotonic(), 0.0  # of processes before this one
        self.deadline = None  # of time.monotonic(), where `steps` are planned by time
        self.validation_every = 1  # 2: every second validation batch is read, and so on
        self.observe = dict  # a function: what else an evaluation writes into the log
        self.signals: list[int] = []  # Ctrl-C and the like
        # Sums over all steps: of losses and norms, and of signals. Reading them waits for a GPU.
        self.watched = torch.zeros(2, device=runtime.device)
        self.look_every = LOG_EVERY if runtime.device.type == "cuda" else 1  # steps
        self.recent = deque(maxlen=RECENT_STEPS * self.look_every)  # (tokens, seconds) of steps
        self.last_save = self.last_report = -math.inf  # so both come at the first step
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.best_step, self.best_loss, self.best_accuracy = 0, 0.0, 0.0
        self.best_weights = self._copy_weights() if task.score else {}
        # float16 gradients underflow to 0 unless the loss is scaled up (Micikevicius et al. 2018).
        self.scaler = torch.amp.GradScaler(enabled=runtime.precision == "fp16")

    def train(self) -> dict:
        """Train to the last step. Returns loss and accuracy on the validation rows.

        The model ends with its best weights if the task has a score, else with the last ones.
        Raises KeyboardInterrupt after Ctrl-C, when a checkpoint is saved, and UserError when loss
        or gradient are NaN or infinite.
        """
        if self.runtime.is_main:
            self.run.rewind_log(self.step or -1)  # the start is evaluated again
        options = {"total": self.steps, "initial": self.step, "unit": "step"}
        with catch_signals(self.signals), self.runtime.progress(**options) as bar:
            self.model.train()
            if self.step == 0 and self.task.start_counts:
                self._log_start()
            computer = self.computer()
            batches = computer.shares(self.step)
            while self.step < self.steps:
                started, (batch, parts) = time.monotonic(), next(batches)
                loss, norm = computer.backward(batch, parts)
                if (self.step + 1) % self.look_every == 0:
                    signals = self._look()
                    # Saved before the update: of these weights we know that their loss is finite.
                    if signals or time.monotonic() - self.last_save > 60 * self.save_minutes:
                        self.save()
                    self._stop(signals)
                    bar.set_postfix_str(f"loss {loss:.3f} ({self.task.baseline})")
                computer.update(norm)
                self.step, self.tokens = self.step + 1, self.tokens + batch.tokens
                self.recent.append((batch.tokens, time.monotonic() - started))
                self.seconds += self.recent[-1][1]
                if self.deadline:
                    keep_deadline(self)
                self._log(loss, norm)
                bar.total = self.steps
                bar.update()
            if self.has_best:
                self.model.load_state_dict(self.best_weights, strict=False)
                final = {"loss": self.best_loss, "accuracy": self.best_accuracy}
            else:
                self.runtime.log(f"step {self.step:>6,}: evaluating on all validation rows")
                final = self.evaluate()
            self.watched[0] += final["loss"]
            self._look()
            self.save()
            self._stop(self.runtime.sum(torch.tensor(len(self.signals))).item())
        return final

    def computer(self) -> "Trainer | Graphs":
        """Whose `shares`, `backward` and `update` compute the steps: this trainer's, or graphs'."""
        return Graphs(self) if self.graphs else self

    def shares(self, first_step: int) -> Iterator[tuple[Any, list]]:
        """The batch of each step from `first_step` on, and the parts that this process computes."""
        return self.runtime.shares(self.task.batches(first_step), self.accumulate)

    def backward(self, batch: Any, parts: list[tuple[tuple, Tensor]]) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a batch, and clip them. `parts` are those of this process.

        Returns (mean loss, norm of the gradients before clipping), both on the device.
        """
        self.set_seed()
        return self.gradients(parts, max(len(batch), 1), len(self.signals))

    def set_seed(self) -> None:
        """Dropout must not depend on where the run was resumed."""
        # The factors are primes: each seed, step and process has a number of its own.
        torch.manual_seed((self.seed * 1_000_003 + self.step) * 1009 + self.runtime.rank)

    def gradients(
        self, parts: list[tuple[tuple, Tensor]], count: int | Tensor, signals: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Of the mean over `count` predictions, clipped. A CUDA graph can record all of it."""
        total = torch.zeros(2, device=self.runtime.device)
        total[1] += signals
        self.scaler.scale(total)  # `unscale_` fails if nothing was scaled; `parts` may be empty
        for inputs, labels in parts:
            with self.runtime.autocast():
                minimised, reported = self.task.loss(self.model, inputs, labels)
            # A mean over the whole batch: parts have different numbers of predictions.
            self.scaler.scale(minimised / count).backward()
            total[0] += reported.detach() / count
        parameters = list(self.trained.values())
        self.runtime.sum_gradients(parameters)
        loss, all_signals = self.runtime.sum(total)
        for optimizer in self.optimizer.parts:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        # Scaled float16 gradients overflow now and then, and `descend` skips such a step.
        checked = loss if self.scaler.is_enabled() else loss + norm
        self.watched += torch.stack([checked, all_signals])
        return loss, norm

    def update(self, norm: Tensor) -> None:
        """Update the weights at the rate of this step, and drop the gradients."""
        self.set_rate()
        self.descend(norm)

    def set_rate(self) -> None:
        """The learning rates of this step."""
        self.optimizer.set_rate(one_cycle(self.step, self.steps, self.warmup))

    def descend(self, norm: Tensor) -> None:
        """The optimizers' steps. After an overflow neither may take one."""
        if not self.scaler.is_enabled() or math.isfinite(norm):
            for optimizer in self.optimizer.parts:
                self.scaler.step(optimizer)
        self.scaler.update()  # lowers the scale after an overflow
        self.optimizer.zero_grad()

    def _look(self) -> int:
        """Signals of all processes so far. UserError if a loss or gradient was NaN or infinite."""
        value, signals = self.watched.tolist()  # a sum with NaN is NaN
        if not math.isfinite(value):
            saved, folder = self.run.state_path.is_file(), self.run.state_path.parent
            where = f"the last good checkpoint is in {folder}" if saved else "none saved"
            what = f"loss or gradient is {value} at step {self.step}"
            raise UserError(f"{what}; {where}; try --resume with a lower --lr")
        return int(signals)

    def _log(self, loss: Tensor, norm: Tensor) -> None:
        """If it is due: evaluate, keep the best weights, add a line to the log."""
        evaluated = self.task.evaluation_due(self.step, self.steps)
        if not (evaluated or self.step % LOG_EVERY == 0 or self.step == self.steps):
            return
        started = time.monotonic()
        self._look()
        self.seconds += time.monotonic() - started  # in which a GPU has computed
        entry = {"step": self.step, "steps": self.steps, "loss": loss.item()}
        entry["gradient_norm"] = norm.item() if math.isfinite(norm) else None
        entry |= {"tokens": self.tokens, "seconds": round(self.seconds, 2)}
        silence = time.monotonic() - self.last_report
        if evaluated:
            entry["validation"] = metrics = self.evaluate(quick=True)
            entry |= self.observe()
            score, best = self.task.score, {"loss": self.best_loss, "accuracy": self.best_accuracy}
            if score and (not self.has_best or score(metrics) > score(best)):
                self.best_step, self.best_weights = self.step, self._copy_weights()
                self.best_loss, self.best_accuracy = metrics["loss"], metrics["accuracy"]
            if silence > REPORT_EVERY or self.step == self.steps:
                report_progress(self, "validation", metrics)
        elif silence > SILENCE and not sys.stderr.isatty():
            report_progress(self, "training", {"loss": entry["loss"]})
        if self.runtime.is_main:
            self.run.log(entry)

    def _log_start(self) -> None:
        """Evaluate the weights before the first step: until then they are the best."""
        metrics = self.evaluate(quick=True)
        self.best_loss, self.best_accuracy = metrics["loss"], metrics["accuracy"]
        values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        self.runtime.log(f"step {0:>6,} of {self.steps:,}   validation {values}")
        if self.runtime.is_main:
            entry = {"step": 0, "steps": self.steps, "loss": metrics["loss"], "tokens": 0}
            self.run.log(entry | {"gradient_norm": None, "seconds": 0.0, "validation": metrics})

    @property
    def has_best(self) -> bool:
        """Whether some weights were evaluated, so that there are best ones."""
        return bool(self.best_step or self.task.start_counts)

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

    def save(self) -> None:
        """Write a checkpoint, from which a run is resumed to the same bits."""
        if self.runtime.is_main:
            self.run.save(self._state())
        self.last_save = time.monotonic()

    def _state(self) -> dict[str, Tensor]:
        """All that training changes, as named tensors; frozen weights are in no checkpoint."""
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
        state, damaged = self._state(), f"{self.run.state_path} is damaged, or of another run"
        # A scaler may be missing on either side, since --precision may change.
        scaler = {k: checkpoint.get(k, t) for k, t in state.items() if k.startswith("scaler/")}
        checkpoint = scaler | {k: t for k, t in checkpoint.items() if not k.startswith("scaler/")}
        mine, theirs = (
            {(name, t.dtype, t.shape) for name, t in x.items()} for x in (state, checkpoint)
        )
        if different := sorted(mine ^ theirs, key=str):
            raise UserError(f"{damaged}: the tensor {different[0][0][:99]}")
        numbers = {name: checkpoint[f"numbers/{name}"].item() for name in NUMBERS}
        if not self._is_possible(**numbers):
            raise UserError(f"{damaged}: " + ", ".join(f"{k} {x:g}" for k, x in numbers.items()))
        for name, value in numbers.items():
            setattr(self, name, type(getattr(self, name))(value))
        for name, tensor in state.items():
            tensor.copy_(checkpoint[name])
        if scaler:
            values = {name: state[f"scaler/{name}"].item() for name in self.scaler.state_dict()}
            self.scaler.load_state_dict(values)
        self.last_save = time.monotonic()

    def _is_possible(
        self, step: float, steps: float, tokens: float, validation_every: float, best_step: float,
        **others: float,
    ) -> bool:  # fmt: skip
        """Whether a checkpoint of this run can hold these numbers; else it is damaged."""
        counts = [step, steps, tokens, validation_every, best_step]
        if not all(0 <= number < 2**53 for number in (*counts, *others.values())):
            return False  # NaN is not either
        if any(count % 1 for count in counts) or not (validation_every and steps >= max(step, 1)):
            return False
        if steps != (self.steps or steps) or (step and not others["seconds"]):
            return False
        if not best_step and self.task.start_counts:
            return True
        evaluated = range(1, int(step) + 1) if self.task.score else ()
        return best_step in ([s for s in evaluated if self.task.evaluation_due(s, steps)] or [0])

    def _copy_weights(self) -> dict[str, Tensor]:
        """A copy of everything that is trained."""
        return {name: p.detach().clone() for name, p in self.trained.items()}


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Any], runtime: Runtime) -> dict:
    """Mean `loss` in nats and `accuracy` over all predictions; processes share the batches."""
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=runtime.device)  # loss, right answers
    mine = batches[runtime.rank :: runtime.world_size]
    with runtime.autocast():  # one context, so that it casts weights only once
        for batch in runtime.progress(mine, desc="evaluation", leave=False):
            inputs, labels = batch.to(runtime.device)
            logits = model(*inputs).float()
            totals[0] += F.cross_entropy(logits, labels, reduction="sum")
            totals[1] += (logits.argmax(-1) == labels).sum()
    model.train(was_training)
    loss, accuracy = (runtime.sum(totals) / max(sum(map(len, batches)), 1)).tolist()
    return {"loss": loss, "accuracy": accuracy}
