"""Ranks: the processes that make one update together, each its part of every minibatch, over torch.distributed.

Every rank has the tables, the weights and the order of minibatches; micro-batches are dealt to them, a loss is divided by
the tokens of all of them, and gradients are summed before each step. So sums, means and norms are those of one process, but
for the order in which floats are added. In one process nothing of this happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def size() -> int:
    """How many there are; 1 in a process of its own."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_mine(place: int) -> bool:
    """Whether what is at that place of a list is this rank's to make."""
    return place % size() == rank()


def gathered(mine: T) -> list[T]:
    """What every rank has, in their order; anything that can be pickled, on the CPU."""
    if size() == 1:
        return [mine]
    found: list[T] = [mine] * size()
    dist.all_gather_object(found, mine)
    return found


def summed(values: np.ndarray, device: torch.device) -> np.ndarray:
    """The sum over all ranks, element by element."""
    if size() == 1:
        return values
    total = torch.from_numpy(values).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Has every rank's gradients be the sum of all. A parameter that no rank has a gradient of keeps none."""
    if size() == 1:
        return
    parameters = list(parameters)
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(there, dist.ReduceOp.MAX)
    works = []
    for parameter, used in zip(parameters, there.tolist(), strict=True):
        if used:
            if parameter.grad is None:  # no micro-batch of this step was this rank's
                parameter.grad = torch.zeros_like(parameter)
            works.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in works:
        work.wait()


def joined_columns(columns: dict[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Name → the parts of all ranks in one; names that no rank has any of are left out."""
    if size() > 1:
        ranks = gathered({name: [part.cpu() for part in parts] for name, parts in columns.items()})
        columns = {name: [part for one in ranks for part in one.get(name, ())]
                   for name in dict.fromkeys(name for one in ranks for name in one)}
    return {name: torch.cat(list(parts)) for name, parts in columns.items() if parts}
