"""One process or several: the little that data-parallel training asks of `torch.distributed`.

`torchrun --nproc-per-node N train.py` starts N processes with the environment set; without it there
is one. Every process computes a share of each batch, gradients are summed, and only the main process
writes.
"""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Processes:
    """Who am I, how many are we, and which device is mine."""

    def __init__(self, device: str = "auto"):
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and self.count > 1:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        self.device = torch.device(device)
        if self.count > 1:
            backend = "gloo" if device == "cpu" else "nccl"
            # The others wait while the main process tokenises, and a large corpus takes hours.
            dist.init_process_group(backend, timeout=timedelta(days=1))

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of this tensor over all processes, on the tensor's device."""
        if self.count > 1:
            moved = tensor.to(self.device)  # NCCL sums on the GPU only
            dist.all_reduce(moved)
            tensor.copy_(moved)
        return tensor

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in one message."""
        if self.count == 1:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = self.sum(torch.cat([p.grad.flatten() for p in parameters]))
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(grad.view_as(p))

    def broadcast(self, value: Any) -> Any:
        """The main process's value, everywhere."""
        if self.count > 1:
            box = [value]
            dist.broadcast_object_list(box, device=self.device)
            value = box[0]
        return value

    def barrier(self) -> None:
        """Until all processes are here."""
        self.broadcast(None)

    def close(self) -> None:
        """Leave the group."""
        if self.count > 1:
            dist.destroy_process_group()
