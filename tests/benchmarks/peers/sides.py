"""Each side of a comparison in a process of its own, so that its peak of memory is its own too."""

import multiprocessing
import os
import sys
from importlib import import_module
from multiprocessing.connection import Connection

from minitune.support.runtime import Runtime, keep_freed_memory
from tests.benchmarks.peers.problem import Problem

CPU = Runtime.start("cpu", "fp32")
SIDES = {
    # name: (module, class, whether it is tuned)
    "ours": ("ours", "Ours", True),
    "tuned": ("theirs", "Theirs", True),
    "shipped": ("theirs", "Theirs", False),
}


def serve(connection: Connection, side: str, problem: Problem) -> None:
    """A side's process: does what it is asked until it is asked nothing more."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # trainers report as they go
    module, name, tuned = SIDES[side]
    if side == "ours":
        keep_freed_memory()  # as the scripts do
    else:  # what minitune/__init__.py sets, and a library's user has not; not read yet
        del os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
    worker = getattr(import_module(f"tests.benchmarks.peers.{module}"), name)(problem, tuned)
    while request := connection.recv():
        if request == "check":
            connection.send({key: value.numpy() for key, value in worker.check().items()})
        else:
            CPU.reset_peak_memory()
            seconds = worker.run()
            connection.send((seconds, CPU.peak_memory()))


class Side:
    """One process, seen from here."""

    def __init__(self, side: str, problem: Problem):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, side, problem), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, request: str):
        """What it answers. EOFError if the process has died."""
        self.connection.send(request)
        return self.connection.recv()

    def end(self) -> None:
        """Let it go, and its memory with it."""
        self.connection.send(None)
        self.process.join()
