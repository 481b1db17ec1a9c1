"""What an update says of each token while it runs, for whoever listens: the ratio of the new policy to the old one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
from torch import Tensor

from stages.ops import ranks

Listener = Callable[[int, np.ndarray, np.ndarray, np.ndarray], None]
"""Called with the epoch from 0, (m,) positions in the tables' flat columns, (m,) log ratios before the step, and (m,) bool
whether the clip took the token's gradient."""
_listener: ContextVar[Listener | None] = ContextVar("ratios", default=None)


@contextmanager
def ratios_heard_by(listener: Listener) -> Iterator[None]:
    """Inside it `listener` is called for every micro-batch of an update's policy."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def say_ratios(epoch: int, minibatch: list[tuple[np.ndarray, Tensor, Tensor]]) -> None:
    """Of a minibatch, all ranks' micro-batches of it. Nothing where nobody listens."""
    if ranks.size() > 1:  # any of them may have a listener, and none knows of another's
        mine = [(index, log_ratio.detach().cpu(), clipped.detach().cpu()) for index, log_ratio, clipped in minibatch]
        minibatch = [each for one in ranks.gathered(mine) for each in one]
    if (listener := _listener.get()) is not None:
        for index, log_ratio, clipped in minibatch:
            listener(epoch, index, log_ratio.detach().cpu().numpy(), clipped.detach().cpu().numpy())
