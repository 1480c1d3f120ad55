"""What a training run says while it goes on."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

REPORT_EVERY = 10  # seconds: small tasks have evaluations faster than anyone reads


class Reporter:
    """A bar where there is a terminal, and lines with the validation metrics, which a log file gets too."""

    def __init__(self, unit: str, yardstick: str, speaks: bool):
        """`unit` of a batch's size; `yardstick`, what a loss is to be compared with; one process speaks."""
        self.unit, self.yardstick, self.speaks = unit, yardstick, speaks
        self.last_report = -math.inf

    @contextlib.contextmanager
    def bar(self, step: int, steps: int) -> Iterator[None]:
        """Show a bar over so many steps, the first ones of which are done."""
        self.steps = steps
        # None: only where there is a terminal.
        disable = None if self.speaks else True
        with tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=disable) as self._bar:
            yield

    def advance(self, loss: float, speed: float) -> None:
        """One step is done; `speed` in units a second."""
        self._bar.update()
        self._bar.set_postfix_str(f"loss {loss:.3f} ({self.yardstick}), {speed:,.0f} {self.unit}/s")

    def report(self, step: int, metrics: dict, speed: float, minutes_left: float, average_of: int) -> None:
        """A line for people, not more often than they can read: at the end and for an average always."""
        due = time.monotonic() - self.last_report > REPORT_EVERY or step == self.steps or average_of > 1
        if not due or not self.speaks:
            return
        self.last_report = time.monotonic()
        what = f"average of {average_of} trainings" if average_of > 1 else "validation"
        values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        line = f"step {step:>6,} of {self.steps:,}   {what} {values} ({self.yardstick})"
        line += f"   {speed:,.0f} {self.unit}/s   {minutes_left:.1f} min left"
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()
