"""Ranks: the processes that make one update together, each its part of every minibatch, over torch.distributed.

Every rank has the tables, the weights and the order of minibatches; micro-batches are dealt to them, a loss is divided by
the tokens of all of them, and gradients are summed before each step. So sums, means and norms are those of one process, but
for the order in which floats are added. In one process nothing of this happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
_in_step = False


def size() -> int:
    """How many there are; 1 in a process of its own."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if size() > 1 else 0


def dealt(count: int) -> list[tuple[int, bool]]:
    """Which places of a list are this rank's to make, each with True. In step it is as many for every rank: one that has
    fewer makes its last, or the list's first, once more, with False, and what comes of that is not to count."""
    mine = [(place, True) for place in range(rank(), count, size())]
    lacking = -(-count // size()) - len(mine) if _in_step else 0
    return mine + [(mine[-1][0] if mine else 0, False)] * lacking


@contextmanager
def in_step() -> Iterator[None]:
    """Inside it every pass through a model is one of all ranks (stages/ops/fsdp.py)."""
    global _in_step
    _in_step = True
    try:
        yield
    finally:
        _in_step = False


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank has but its shard of it (stages/ops/fsdp.py)."""
    return size() > 1 and hasattr(tensor, "to_local")


def gathered(mine: T) -> list[T]:
    """What every rank has, in their order; anything that can be pickled, on the CPU."""
    if size() == 1:
        return [mine]
    found: list[T] = [mine] * size()
    dist.all_gather_object(found, mine)
    return found


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks, element by element; in place."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Has every rank's gradients be the sum of all. A parameter that no rank has a gradient of keeps none; one that
    is sharded has the sum already."""
    if size() == 1:
        return
    parameters = [parameter for parameter in parameters if not is_sharded(parameter)]
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
