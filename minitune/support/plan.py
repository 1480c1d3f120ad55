"""A run that is planned by time: how many steps fit before a deadline, evaluations included.

And the line that says how far a run is, and how much time is left.

`trainer` is a training.Trainer. Work is counted in tokens to train on. To read a token in an
evaluation costs a third of that: a backward pass takes about twice as long as a forward pass.
"""

import copy
import math
import time
from itertools import islice
from statistics import median
from typing import Any

from minitune.fast.compiled import keep_compiled

PROBE_STEPS = 100  # the speed is measured over this many steps at most,
PROBE_SHARE = 0.05  # and in this share of the time at most
EVALUATION_SHARE = 0.2  # of the time, for all evaluations, at most
CHECK_EVERY = 5  # steps: then the plan is compared with the speed of the last steps
RECENT_STEPS = 20  # the last ones; for a GPU times LOG_EVERY, since it is waited for only then
TOLERANCE = 0.1  # the plan is changed if the steps to go are wrong by more than this share


def plan_steps(trainer: Any, deadline: float) -> None:
    """Set `steps`, so that training and evaluations end by `deadline`, of time.monotonic().

    Where evaluations would take too much of the time, they read an evenly spread part of the rows.
    """
    trainer.deadline, started = deadline, time.monotonic()
    trainer.steps = 10**9  # not known yet
    # Measured on a copy, so that a run of N steps is the same however N was chosen.
    probe, times, tokens = copy.copy(trainer), [], 0
    parts = trainer.model.train(), trainer.trained, trainer.optimizer, trainer.scaler
    probe.model, probe.trained, probe.optimizer, probe.scaler = copy.deepcopy(parts)
    probe.watched = trainer.watched.clone()
    keep_compiled(trainer.model, probe.model)
    computer = probe.computer()
    for batch, share in islice(computer.shares(0), PROBE_STEPS):
        before = time.monotonic()
        _, norm = computer.backward(batch, share)
        computer.update(norm)
        norm.item()  # waits for a GPU
        times.append(time.monotonic() - before)
        tokens += batch.tokens
        late = time.monotonic() - started > PROBE_SHARE * (deadline - started)
        if trainer.runtime.broadcast(late and len(times) > 1):
            break
    batch_tokens = tokens / len(times)
    speed = batch_tokens / median(times[len(times) // 2 :])  # the first steps compile kernels
    allowed = EVALUATION_SHARE * speed * max(deadline - time.monotonic(), 1e-6)
    every = max(1, math.ceil(evaluation_tokens(trainer) / allowed))
    trainer.validation_every = trainer.runtime.broadcast(every)
    if trainer.validation_every > 1:
        part = f"1 of {trainer.validation_every:,} validation batches"
        trainer.runtime.log(f"little time to evaluate: {part} is read")
    trainer.steps = steps_left(trainer, speed, batch_tokens)


def keep_deadline(trainer: Any) -> None:
    """Move the end of the run, and of its schedule, where the speed is not what was planned."""
    to_go = trainer.steps - trainer.step
    every = CHECK_EVERY
    if trainer.look_every > 1:  # a tenth of the run, at least two looks
        every = max(2, min(RECENT_STEPS, trainer.steps // 10 // trainer.look_every))
        every *= trainer.look_every
    if to_go and trainer.step % every == 0:
        tokens, seconds = map(sum, zip(*trainer.recent, strict=True))
        left = steps_left(trainer, tokens / seconds, trainer.tokens / trainer.step)
        if abs(left - to_go) > max(2, TOLERANCE * to_go):
            steps = trainer.step + left
            change = f"{steps:,} steps instead of {trainer.steps:,}"
            trainer.runtime.log(f"the speed has changed: {change}")
            trainer.steps = steps


def steps_left(trainer: Any, speed: float, batch_tokens: float) -> int:
    """How many more steps of `batch_tokens` fit at `speed` tokens a second; at least 1."""
    tokens = (trainer.deadline - time.monotonic()) * speed - evaluation_tokens(trainer)
    return trainer.runtime.broadcast(max(1, int(tokens / batch_tokens)))


def evaluation_tokens(trainer: Any) -> float:
    """What all evaluations to come cost: quick ones on the way, and a full one at the end."""
    full, quick = (
        sum(b.tokens for b in trainer.task.validation_batches(quick)[:: trainer.validation_every])
        for quick in (False, True)
    )
    return (full + trainer.task.evaluations * (1 - trainer.step / trainer.steps) * quick) / 3


def report_progress(trainer: Any, rows: str, metrics: dict) -> None:
    """Print a line: what was measured on which rows, the speed, and the time that is left."""
    trainer.last_report = time.monotonic()
    values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    minutes = (trainer.steps - trainer.step) * trainer.seconds / trainer.step / 60
    speed = f"{trainer.tokens / trainer.seconds:,.0f} {trainer.task.unit}/s"
    trainer.runtime.log(
        f"step {trainer.step:>6,} of {trainer.steps:,}   {rows} {values} "
        f"({trainer.task.baseline})   {speed}   {minutes:.1f} min left"
    )
