"""An update once more, for what it said of each token in each epoch: nothing of that is kept, since it can be had again."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np

from flows.again import call_again
from flows.chains import warm_of
from flows.perform import perform
from flows.runs.run import Run
from flows.runs.start import check_device
from flows.store.lease import wait_for_gc
from schemas.errors import ConfigError
from schemas.tables import Advantages
from stages.ops.ratios import ratios_heard_by


@dataclass(frozen=True)
class Epoch:
    """One epoch's ratios, as the step that each token was in found them."""

    ratio: np.ndarray  # (n,) π/π_old, NaN where the epoch did not come to the token
    clipped: np.ndarray  # (n,) bool: the clip took the token's gradient


def replay(run: Run, iteration: int) -> tuple[list[Epoch], bool]:
    """The epochs of an iteration's update, over the flat columns of its tables; and whether it gave the same bytes again.

    Raises `ConfigError` where the iteration has no update.
    """
    run.recorded("ppo", iteration)
    wait_for_gc(run.store)
    call = call_again(run, "ppo", iteration, ())
    check_device(call.execution)
    size = len(run.store.table(run.recorded("gae", iteration), Advantages).advantages.values)
    epochs: dict[int, Epoch] = {}

    def hear(number: int, index: np.ndarray, log_ratio: np.ndarray, clipped: np.ndarray) -> None:
        epoch = epochs.setdefault(number, Epoch(np.full(size, np.nan, np.float32), np.zeros(size, bool)))
        epoch.ratio[index], epoch.clipped[index] = np.exp(log_ratio), clipped

    with closing(warm_of(call.kind, run.store, call.execution)) as warm, ratios_heard_by(hear):
        produced = perform(call, run.store, warm, again=True)
    if not epochs:
        raise ConfigError(f"iteration {iteration} of run {run.name!r} trained the critic alone (ppo.critic_warmup)")
    return [epoch for _, epoch in sorted(epochs.items())], produced.how == "reproduced"
