"""Samples of an iteration with the numbers that they were given: those of its evaluation, or of what it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flows.runs.run import Run
from schemas.artifacts import TrainState
from schemas.tables import Returns, Rewards, Rollouts, Samples


@dataclass(frozen=True)
class Sample:
    """`about`: what is known of it; `given`: its numbers, the one that matters most first. Episodes have no texts."""

    prompt: str
    response: str
    about: dict[str, Any]
    given: dict[str, float]


def evaluated(run: Run, state: TrainState, count: int) -> Iterator[Sample]:
    """The first held-out samples, or episodes of a control task, if the state was evaluated."""
    if (ref := state.artifacts.get("evaluate")) is None:
        return
    if not run.store.has_table(ref, Samples):
        returns = run.store.table(ref, Returns)
        for i in range(min(count, len(returns))):
            yield Sample("", "", {"seed": int(returns.seed[i])},
                         {"episode_return": float(returns.episode_return[i]), "length": float(returns.length[i])})
        return
    samples = run.store.table(ref, Samples)
    for i in range(min(count, len(samples))):
        given = {name: float(getattr(samples, name)[i]) for name in ("gold", "win", "score", "kl")}
        given |= {f"judge.{name}": float(values[i]) for name, values in (samples.judges or {}).items()}
        about = {"row_id": int(samples.row_id[i]), "prompt_id": int(samples.prompt_ids[i]),
                 "finish_reason": samples.finish_reason[i], "response_length": int(samples.response_length[i])}
        yield Sample(samples.prompt[i], samples.response[i], about, given)


def sampled(run: Run, state: TrainState, count: int) -> Iterator[Sample]:
    """The first rows of what the iteration was trained on, with each component of the reward."""
    if "reward" not in state.artifacts:
        return
    rollouts, rewards = (run.store.table(state.artifacts.get("resample", state.artifacts[stage]), kind)
                         for stage, kind in (("rollout", Rollouts), ("reward", Rewards)))
    for i in range(min(count, len(rollouts))):
        given = {"reward": float(rewards.score[i])}
        given |= {f"reward.{name}": float(values[i]) for name, values in rewards.components.items()}
        about = {"row_id": int(rollouts.row_id[i]), "prompt_id": int(rollouts.prompt_id[i]),
                 "finish_reason": rollouts.finish_reason[i], "response_length": len(rollouts.response_tokens[i])}
        yield Sample(rollouts.prompt[i], rollouts.response[i], about, given)
