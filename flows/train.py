"""A whole run: prepare, then fold TrainState through the iterations."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from prefect import flow

from flows import tasks
from flows.iterate import metrics_of, run_iteration
from flows.mirror import Mirror
from flows.runs import Run, open_run
from flows.store import Store
from schemas.artifacts import ArtifactRef, ModelRef, TrainState

log = logging.getLogger("baton")


@flow(name="train", flow_run_name="{name}-train", persist_result=False)
def train_flow(name: str, store: str, overrides: dict[str, Any] | None = None) -> TrainState:
    """The last state of the run `name`. Goes on where it stopped: what is committed is found, not computed again."""
    run = open_run(Store(Path(store)), name, overrides)
    with Mirror(run) as mirror:
        state = run.last() or prepare(run)
        mirror.push(state)
        while state.iteration < run.config.iterations:
            state = run_iteration(run, state, run.config.iterations)
            mirror.push(state)
    return state


def prepare(run: Run) -> TrainState:
    """State 0: the starting actor, critic and reward model, and how the actor does before any PPO."""
    started, artifacts = time.perf_counter(), {}
    if run.config.base_model.source is None:
        artifacts["base_model"] = _said(run, tasks.base_model(run, 0))
    actor = base_of(run, artifacts)
    if run.config.sft:
        artifacts["sft"] = _said(run, tasks.sft(run, 0, base=actor))
        actor = ModelRef(artifact=artifacts["sft"], folder="actor")
    reward_model = None
    if run.config.reward_model:
        artifacts["reward_model"] = _said(run, tasks.reward_model(run, 0, start=actor))
        reward_model = ModelRef(artifact=artifacts["reward_model"], folder="reward_model")
    bias = 0.0
    if run.config.reward.center_on_demonstrations:
        artifacts["reward_bias"] = _said(run, tasks.reward_bias(run, 0, reference_model=actor, reward_model=reward_model))
        bias = run.store.manifest(artifacts["reward_bias"]).metrics["bias"]
    artifacts["evaluate"] = _said(run, tasks.evaluate(
        run, 0, updated_actor=actor, reference_model=actor, reward_model=reward_model, baseline=None, reward_bias=bias))
    critic = run.config.value and (reward_model if run.config.value.start == "reward_model" else actor)
    state = TrainState(
        iteration=0, actor=actor, critic=critic, optimizer=None, reference=actor, reward_model=reward_model,
        baseline=artifacts["evaluate"], artifacts=artifacts, kl_coef=run.config.kl.coef, reward_bias=bias,
        metrics=metrics_of(run, artifacts), seconds=time.perf_counter() - started)
    run.save(state)
    return state


def base_of(run: Run, artifacts: dict[str, ArtifactRef]) -> ModelRef:
    """The base model: the one made for the run, or the one it was given."""
    return ModelRef(artifact=artifacts.get("base_model") or run.inputs["base_model"], folder="model")


SHOWN = {"base_model": ("parameters",), "sft": ("loss",), "reward_model": ("heldout_accuracy",),
         "reward_bias": ("bias",), "evaluate": ("gold", "score")}


def _said(run: Run, ref: ArtifactRef) -> ArtifactRef:
    """The reference, after a line about what was made or found."""
    manifest = run.store.manifest(ref)
    numbers = "  ".join(f"{name} {manifest.metrics[name]:.4g}" for name in SHOWN[ref.stage])
    how = "found" if ref in run.found else f"{manifest.seconds:.1f} s"
    log.info(f"{ref.stage:<13} {numbers}  {how}")
    return ref
