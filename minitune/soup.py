"""Averaging the weights of several trainings that began with the same ones."""

from itertools import pairwise

import torch
from torch import Tensor


class Soup:
    """The average so far, and where the next training begins.

    Each training reads the same rows in another order and ends somewhere else, but pretrained
    weights hardly leave the valley of the loss that they are in. The average lies in it too, as a
    rule deeper than what went into it, and is still one network (Wortsman et al. 2022, "Model
    soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
    inference time").
    """

    def __init__(self, weights: dict[str, Tensor], ends: list[int]):
        """`weights` by name, from which every training starts; `ends`, the last step of each, ascending."""
        self.start = {name: tensor.detach().clone() for name, tensor in weights.items()}
        self.ends = ends
        self.average: dict[str, Tensor] = {}

    def span(self, step: int) -> tuple[int, int]:
        """(first, end): the training that this step is in, as a half-open range of steps."""
        return next(span for span in pairwise([0, *self.ends]) if step < span[1])

    @torch.no_grad()
    def add(self, weights: dict[str, Tensor], end: int) -> int:
        """Put in what the training that ended with this step has learned; how many the average is of now."""
        count = self.ends.index(end) + 1
        for name, tensor in weights.items():
            if count == 1:
                self.average[name] = tensor.detach().clone()
            else:
                self.average[name].lerp_(tensor, 1 / count)
        return count
