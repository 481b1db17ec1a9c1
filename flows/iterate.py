"""One iteration: TrainState i − 1 to TrainState i. What a work pool schedules."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from prefect import flow

from flows import tasks
from flows.mirror import Mirror
from flows.runs import Run, open_run
from flows.store import Store
from schemas.artifacts import ArtifactRef, ModelRef, Moments, TrainState, prefixed
from stages.ops.kl import adapted_kl_coef

log = logging.getLogger("baton")


def run_iteration(run: Run, state: TrainState, last: int) -> TrainState:
    """The iteration after `state`; evaluated if it is due, or the `last` one. Stages already committed are found."""
    i, started, found = state.iteration + 1, time.perf_counter(), len(run.found)
    made = {"rollout": tasks.rollout(run, i, actor=state.actor)}
    rollouts = made["rollout"]
    made["reference"] = tasks.reference(run, i, reference_model=state.reference, rollouts=rollouts)
    made["reward"] = tasks.reward(run, i, reward_model=state.reward_model, rollouts=rollouts,
                                  reward_bias=state.reward_bias, reward_moments=state.reward_moments)
    if state.critic:
        made["value"] = tasks.value(run, i, critic=state.critic, rollouts=rollouts)
    values = made.get("value")
    made["gae"] = tasks.gae(run, i, rollouts=rollouts, reference=made["reference"], rewards=made["reward"],
                            values=values, kl_coef=state.kl_coef)
    made["ppo"] = tasks.ppo(run, i, actor=state.actor, critic=state.critic, optimizer=state.optimizer, rollouts=rollouts,
                            reference=made["reference"], values=values, advantages=made["gae"], kl_coef=state.kl_coef)
    actor = ModelRef(artifact=made["ppo"], folder="actor")
    if _evaluation_due(run, i, last):
        made["evaluate"] = tasks.evaluate(run, i, updated_actor=actor, reference_model=state.reference,
                                          reward_model=state.reward_model, baseline=state.baseline,
                                          reward_bias=state.reward_bias)
    metrics = metrics_of(run, made)
    after = state.model_copy(update=dict(
        iteration=i, actor=actor, critic=ModelRef(artifact=made["ppo"], folder="critic") if state.critic else None,
        optimizer=ModelRef(artifact=made["ppo"], folder="optimizer"), artifacts=made, metrics=metrics,
        kl_coef=_next_kl_coef(run, state, metrics["gae/kl"]),
        reward_moments=_moments(metrics), seconds=time.perf_counter() - started))
    run.save(after)
    log.info(line(after, last, run.found[found:]))
    return after


def _next_kl_coef(run: Run, state: TrainState, kl: float) -> float:
    """β after the iteration that follows `state`; kept in a critic warm-up, where the KL is 0 and nobody's merit."""
    if state.iteration < run.config.ppo.critic_warmup:
        return state.kl_coef
    return adapted_kl_coef(state.kl_coef, kl, run.config.rollout.batch_size, run.config.kl)


def _moments(metrics: dict[str, float]) -> Moments:
    """The running moments of scores with this iteration's, where `reward` keeps them."""
    return Moments(**{name: metrics[f"reward/running_{name}"] for name in Moments.model_fields
                      if f"reward/running_{name}" in metrics})


def metrics_of(run: Run, artifacts: dict[str, ArtifactRef]) -> dict[str, float]:
    """`stage/metric` of the artifacts."""
    return {key: value for stage, ref in artifacts.items()
            for key, value in prefixed(stage, run.store.manifest(ref).metrics).items()}


def _evaluation_due(run: Run, iteration: int, last: int) -> bool:
    every = run.config.evaluate.every
    return iteration == last or (every > 0 and iteration % every == 0)


def line(state: TrainState, last: int, found: list[ArtifactRef]) -> str:
    """The iteration in one line: reward, KL, gold, seconds."""
    m = state.metrics
    gold = f"  gold {m['evaluate/gold']:7.3f}" if "evaluate/gold" in m else ""
    skipped = f"  (found {', '.join(ref.stage for ref in found)})" if found else ""
    return (f"iteration {state.iteration:>{len(str(last))}}/{last}  reward {m['reward/score']:7.3f}  "
            f"KL {m['gae/kl']:6.2f}{gold}  {state.seconds:5.1f} s{skipped}")


@flow(name="iterate", flow_run_name="{name}-iterate", persist_result=False)
def iterate_flow(name: str, store: str, overrides: dict[str, Any] | None = None) -> TrainState:
    """The next iteration of the run `name`. Raises `ConfigError` when it is finished or not prepared."""
    run = open_run(Store(Path(store)), name, overrides)
    state = run.to_iterate()
    with Mirror(run) as mirror:
        mirror.push(state)
        after = run_iteration(run, state, run.config.iterations)
        mirror.push(after)
    return after
