"""Every stage, declared once: what it is called, what it writes and measures. How it computes is in stages/.

In the order in which a run goes through them. The form on Prefect's page, `baton diff`, the reader of tables and the tasks
all take it from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from schemas.metrics import (
    BaseModelMetrics,
    ControlEvaluateMetrics,
    ControlRolloutMetrics,
    EvaluateMetrics,
    GAEMetrics,
    Metrics,
    PolicyMetrics,
    PPOMetrics,
    ReferenceMetrics,
    ResampleMetrics,
    RewardBiasMetrics,
    RewardMetrics,
    RewardModelMetrics,
    RolloutMetrics,
    SFTMetrics,
    ValueMetrics,
)
from schemas.tables import (
    Advantages,
    DroppedResponses,
    ReferenceLogprobs,
    Returns,
    Rewards,
    Rollouts,
    Samples,
    ScoredTexts,
    Table,
    TokenRewards,
    Trajectories,
    Values,
)

Kind = Literal["language", "control"]


@dataclass(frozen=True)
class Stage:
    """One stage of a kind of run."""

    kind: Kind
    name: str
    version: int
    """Raised when its results change, were it in their last bits; part of the identity of what it writes."""
    metrics: type[Metrics]
    table: type[Table] | None = None
    """What it writes, if that is a table; models otherwise."""
    beside: tuple[type[Table], ...] = ()
    """Tables that it may write beside that one."""
    headline: tuple[str, ...] = ()
    """Metrics of the line that announces it before the first iteration."""
    sharded: bool = False
    """Whether its rows do not need each other, so that they can be made apart."""
    ranked: bool = False
    """Whether several processes can make it together, each a part of every minibatch."""


def _by_name(*stages: Stage) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages}


GAE_VERSION = 3

STAGES: dict[Kind, dict[str, Stage]] = {
    "language": _by_name(
        Stage("language", "base_model", 1, BaseModelMetrics, headline=("parameters",)),
        Stage("language", "sft", 2, SFTMetrics, headline=("loss",), ranked=True),
        Stage("language", "reward_model", 2, RewardModelMetrics, headline=("heldout_accuracy",), ranked=True),
        Stage("language", "reward_bias", 2, RewardBiasMetrics, Rewards, headline=("bias",)),
        Stage("language", "rollout", 2, RolloutMetrics, Rollouts, sharded=True),
        Stage("language", "reference", 2, ReferenceMetrics, ReferenceLogprobs, sharded=True),
        Stage("language", "reward", 3, RewardMetrics, Rewards, (TokenRewards, ScoredTexts), sharded=True),
        Stage("language", "resample", 2, ResampleMetrics, Rollouts,
              (Rewards, TokenRewards, ScoredTexts, DroppedResponses)),
        Stage("language", "value", 2, ValueMetrics, Values, sharded=True),
        Stage("language", "gae", GAE_VERSION, GAEMetrics, Advantages),
        Stage("language", "ppo", 4, PPOMetrics, ranked=True),
        Stage("language", "evaluate", 3, EvaluateMetrics, Samples, headline=("gold", "score"), sharded=True),
    ),
    "control": _by_name(
        Stage("control", "policy", 1, PolicyMetrics, headline=("actor_parameters", "critic_parameters")),
        Stage("control", "rollout", 2, ControlRolloutMetrics, Trajectories),
        Stage("control", "gae", GAE_VERSION, GAEMetrics, Advantages),
        Stage("control", "ppo", 3, PPOMetrics),
        Stage("control", "evaluate", 1, ControlEvaluateMetrics, Returns, headline=("episode_return",)),
    ),
}
STAGE_NAMES = tuple(dict.fromkeys(name for stages in STAGES.values() for name in stages))
