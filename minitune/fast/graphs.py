"""Training steps as CUDA graphs: a GPU repeats a recorded step without Python.

A step is hundreds of kernels. To start one from Python takes about 10 µs, more than many of them
need. A CUDA graph records the kernels of a step once, and from then on starts all of them together.

A graph reads and writes the same memory each time. So all batches must have one of few shapes: they
are filled up with [PAD] tokens, in sequences of their own, which have no label. The first step of
a shape is computed as always, which compiles what is not compiled yet; the second one is recorded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.batching import PackedBatch, copy_to

MULTIPLE = 64  # of the tokens and of the predictions in a filled batch
IGNORED = -100  # the label that cross_entropy ignores


@dataclass
class Filled:
    """Examples that are packed and filled up."""

    batch: PackedBatch
    labels: Tensor

    def to(self, device: torch.device) -> tuple[tuple[PackedBatch], Tensor]:
        """The model's arguments and the labels, on a device."""
        return (self.batch.to(device),), *copy_to(device, self.labels)


def fill(batch: PackedBatch, budget: int, at_most: int, pad_id: int, least: int) -> PackedBatch:
    """The batch, of at most `budget` tokens, with `least` or more tokens of [PAD] behind it.

    Its sizes depend on the sizes of the batch alone: a step that is computed again, after a kill,
    has the same ones. No sequence is longer than `at_most`, and those of [PAD] are shorter than
    `max_seqlen`: their first token may be read twice, as [CLS] and as a prediction.
    """
    T, B = batch.tokens.numel(), batch.cu_seqlens.numel() - 1
    longest = min(power_of_two(max(batch.max_seqlen, MULTIPLE)), at_most)
    sequences = power_of_two(B + 1)
    while True:
        more, missing = sequences - B, multiple(budget + sequences) - T
        if least <= missing <= more * (longest - 1):
            break
        sequences *= 2
    ends = T + torch.arange(1, more + 1) * missing // more  # about equally long
    cu_seqlens = torch.cat([batch.cu_seqlens, ends.to(batch.cu_seqlens.dtype)])
    return PackedBatch(F.pad(batch.tokens, (0, missing), value=pad_id), cu_seqlens, longest)


def power_of_two(number: int) -> int:
    """The smallest one that is not less."""
    return 1 << (number - 1).bit_length()


def multiple(number: int) -> int:
    """The next multiple of MULTIPLE."""
    return -(-number // MULTIPLE) * MULTIPLE


def budget_for(tokens: int, most: int) -> int:
    """How many tokens a filled batch has room for: `most`, if it is not less than half full."""
    return min(most, power_of_two(max(tokens, MULTIPLE)))


def fill_masked(part: Any, task: Any, at_most: int) -> Any:
    """A batch of masked-language modelling. Some [PAD] are read too: their label is [PAD]."""
    T, budget = part.tokens, budget_for(part.tokens, task.batch_tokens)
    missing = multiple(round(task.rate * budget)) - len(part)  # predictions
    batch = fill(part.batch, budget, at_most, task.pad, least=missing)
    positions = torch.cat([part.positions, torch.arange(T, T + missing)])
    labels = F.pad(part.labels, (0, missing), value=task.pad)
    return replace(part, batch=batch, positions=positions, labels=labels)


def fill_examples(part: Any, task: Any, at_most: int) -> Filled:
    """A batch of texts and their labels; [PAD] texts have the label -100, or a probability of 0."""
    packed, budget = part.inputs.pack(), budget_for(part.tokens, task.batch_tokens)
    batch = fill(packed, budget, at_most, pad_id=0, least=0)  # any id: no text sees it
    missing = batch.cu_seqlens.numel() - packed.cu_seqlens.numel()
    if part.labels.is_floating_point():
        return Filled(batch, F.pad(part.labels, (0, 0, 0, missing)))
    return Filled(batch, F.pad(part.labels, (0, missing), value=IGNORED))


class Recorded:
    """Work that a graph repeats; `result` is what it gives, in the same tensors each time."""

    def __init__(self, work: Callable[[], Any], pool: tuple):
        self.graph = torch.cuda.CUDAGraph()
        # The thread that prepares batches may use the GPU meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.result = work()

    def replay(self) -> None:
        self.graph.replay()


class Graphs:
    """Computes the steps of a `Trainer`, by the methods of the same names.

    For one process, without `accumulate`, and without a scaler.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        # Graphs use the same memory, one after the other.
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self.count = torch.ones((), device=trainer.runtime.device)
        self.steps: dict[tuple, tuple | None] = {}  # by shape; None: not recorded yet
        self.current: tuple | None = None
        trainer.optimizer.keep_rates_on(trainer.runtime.device)

    def shares(self, first_step: int) -> Iterator[tuple[Any, list]]:
        """As that of `Trainer`, but filled up."""
        trainer, task = self.trainer, self.trainer.task
        at_most = trainer.model.config.max_position_embeddings

        def fill_up(part: Any) -> Any:
            fill_part = fill_masked if hasattr(part, "positions") else fill_examples
            return fill_part(part, task, at_most)

        return trainer.runtime.shares(task.batches(first_step), 1, fill_up)

    def backward(self, batch: Any, parts: list[tuple[tuple, Tensor]]) -> tuple[Tensor, Tensor]:
        """As that of `Trainer`. The tensors that it returns are those of the next step, too."""
        trainer, [part] = self.trainer, parts
        trainer.set_seed()
        self.count.fill_(max(len(batch), 1))
        tensors, longest = flatten(*part)
        shape = (longest, *(tuple(x.shape) for x in tensors))
        if shape not in self.steps:
            self.steps[shape] = self.current = None
            loss, norm = trainer.gradients([part], self.count)
        else:
            if self.steps[shape] is None:
                self.steps[shape] = self.record([x.clone() for x in tensors], longest)
            inputs, backward, _ = self.current = self.steps[shape]
            for ours, given in zip(inputs, tensors, strict=True):
                ours.copy_(given)
            backward.replay()
            loss, norm = backward.result
        if trainer.signals:
            trainer.watched[1] += len(trainer.signals)
        return loss, norm

    def record(self, inputs: list[Tensor], longest: int) -> tuple:
        """(inputs, graph of `gradients`, graph of `descend`) for batches of this shape."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the graphs have memory of their own
        trainer = self.trainer
        for group in trainer.optimizer.groups:
            group["capturable"] = True  # or AdamW refuses to be recorded
        try:
            backward = Recorded(
                lambda: trainer.gradients([unflatten(inputs, longest)], self.count), self.pool
            )
            update = Recorded(lambda: trainer.descend(backward.result[1]), self.pool)
        except RuntimeError as error:
            error.add_note("no CUDA graph of a step could be recorded; try --cuda-graphs off")
            raise
        for group in trainer.optimizer.groups:
            group["capturable"] = False  # or it warns in steps that are not recorded
        return inputs, backward, update

    def update(self, norm: Tensor) -> None:
        """As that of `Trainer`."""
        self.trainer.set_rate()
        if self.current is None:
            self.trainer.descend(norm)
        else:
            _, _, update = self.current
            update.replay()


def flatten(inputs: tuple, labels: Tensor) -> tuple[list[Tensor], int]:
    """All tensors of (batch, …), labels, and the batch's `max_seqlen`."""
    batch, *positions = inputs
    return [batch.tokens, batch.cu_seqlens, *positions, labels], batch.max_seqlen


def unflatten(tensors: list[Tensor], longest: int) -> tuple[tuple, Tensor]:
    """The opposite, with a new batch, which has computed nothing yet."""
    tokens, cu_seqlens, *positions, labels = tensors
    return (PackedBatch(tokens, cu_seqlens, longest), *positions), labels
