"""The task of `gae`, which runs no model: apart from the others, so that a rerun of it imports no library of models."""

from __future__ import annotations

from typing import Any

from flows.runs.produce import StageOutput
from flows.runs.work import Work
from schemas.artifacts import Outputs
from schemas.settings import GAEConfig, KLConfig
from schemas.tables import ReferenceLogprobs, Rewards, Rollouts, TokenRewards, Values
from stages import gae as gae_stage
from stages.ops.learning_signal import of_advantages


def gae(work: Work[Any]) -> StageOutput:
    config, kl_coef = work.settings(GAEConfig), work.setting("kl_coef")
    kl = KLConfig(coef=kl_coef, estimator=work.setting("kl_estimator"), placement=work.setting("kl_placement"))
    rollouts, values = work.table("rollouts", Rollouts), work.table_if_given("values", Values)
    reference, rewards = work.table_if_given("reference", ReferenceLogprobs), work.table("rewards", Rewards)
    advantages = gae_stage.gae(rollouts, reference, rewards, values, config, kl, kl_coef=kl_coef,
                               token_rewards=work.table_beside("rewards", TokenRewards))
    work.attempt.table(advantages)
    metrics = gae_stage.metrics(advantages, rollouts, values, config, kl_coef=kl_coef if reference else None,
                                scores=rewards.score)
    work.warn(of_advantages(advantages.raw_advantages.values, metrics.equal_groups, config, kl))
    return StageOutput(metrics, outputs=Outputs(kl=gae_stage.mean_kl(advantages) if reference else None))
