"""Ctrl-C, so that nothing is lost."""

import signal


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
