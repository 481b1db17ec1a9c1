"""One record per stage; every metric is defined where it is declared.

A metric is logged as `stage/name`. Means over tokens are over response tokens, EOS included where it was sampled.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Metrics(BaseModel):
    """Base of all metric records."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def flat(self) -> dict[str, float]:
        """Name → value; a mapping field `f` gives `f_name` for each name, and what was not measured is left out."""
        flat: dict[str, float] = {}
        for name, value in self:
            if isinstance(value, dict):
                flat |= {f"{name}_{part}": float(x) for part, x in value.items()}
            elif value is not None:
                flat[name] = float(value)
        return flat


class BaseModelMetrics(Metrics):
    parameters: int
    """Trainable numbers of the model."""
    vocab_size: int
    """V, entries of the tokenizer."""


class SFTMetrics(Metrics):
    loss: float
    """Cross-entropy in nats a token, mean over the last tenth of the steps."""
    steps: int
    """Optimizer steps."""


class RewardModelMetrics(Metrics):
    loss: float
    """−log σ(r_chosen − r_rejected) plus the centring term, mean over the last tenth of the steps."""
    steps: int
    """Optimizer steps."""
    heldout_accuracy: float
    """Part of the held-out pairs whose chosen response is scored higher."""
    heldout_margin: float
    """r_chosen − r_rejected, mean over held-out pairs."""


class RolloutMetrics(Metrics):
    response_length: float
    """R, mean."""
    response_length_max: int
    """R of the longest response."""
    eos_fraction: float
    """Part of the responses that ended with EOS."""
    logprob: float
    """log π_old of a sampled token, nats, mean; its negative estimates the entropy."""


class ReferenceMetrics(Metrics):
    logprob: float
    """log π_ref of a sampled token, nats, mean."""


class RewardMetrics(Metrics):
    score: float
    """Score of a response, mean."""
    score_std: float
    """Standard deviation of the scores (n − 1)."""
    score_min: float
    """Lowest score."""
    score_max: float
    """Highest score."""
    component: dict[str, float]
    """Each component before its weight, mean."""


class ValueMetrics(Metrics):
    value: float
    """V(s_t), mean over tokens."""
    value_std: float
    """Standard deviation of V(s_t) over tokens."""


class GAEMetrics(Metrics):
    kl: float
    """KL estimate to the reference, nats a response, mean."""
    kl_per_token: float
    """KL estimate to the reference, nats a token, mean."""
    kl_coef: float
    """β that was applied."""
    reward: float
    """Σ_t r_t of a response, mean: score minus β times KL."""
    advantage_mean: float
    """A_t before whitening, mean over tokens."""
    advantage_std: float
    """A_t before whitening, standard deviation over tokens."""
    return_mean: float
    """returns_t, mean over tokens."""
    return_std: float
    """returns_t, standard deviation over tokens."""
    explained_variance: float | None
    """1 − Var(returns − V)/Var(returns) over tokens; not given where returns do not vary."""


class PPOMetrics(Metrics):
    """Means over the tokens of all minibatches, each measured before its own step, unless said otherwise."""

    policy_loss: float
    """−min(ratio·A, clip(ratio)·A)."""
    value_loss: float
    """½·max of the clipped and unclipped squared error."""
    entropy: float
    """Entropy of the policy's next-token distribution, nats."""
    approx_kl: float
    """KL of the rollout's policy to the updated one, k3 = (ratio − 1) − log ratio, nats a token."""
    approx_kl_k1: float
    """The same by k1 = −log ratio."""
    approx_kl_final: float
    """approx_kl in the last minibatch alone."""
    clip_fraction: float
    """Part of the tokens with ratio outside [1 − ε_low, 1 + ε_high]."""
    value_clip_fraction: float
    """Part of the tokens where the clipped square was the larger one."""
    ratio_min: float
    """Least ratio seen."""
    ratio_max: float
    """Greatest ratio seen."""
    grad_norm_actor: float
    """Norm of the actor's gradient before clipping, mean over steps."""
    grad_norm_critic: float
    """Norm of the critic's gradient before clipping, mean over steps."""
    steps: int
    """Optimizer steps taken; fewer than epochs × minibatches where target_kl ended the update."""


class EvaluateMetrics(Metrics):
    gold: float
    """The judge's score of a held-out sample, mean (the reward where no judge is set)."""
    gold_std: float
    """Its standard deviation over samples (n − 1)."""
    score: float
    """The reward of a held-out sample, mean."""
    kl: float
    """Σ_t log π − log π_ref of a held-out sample, nats, mean."""
    win_rate: float
    """Part of the prompts whose sample beats the starting actor's by gold; ties count half."""
    response_length: float
    """R, mean."""
    eos_fraction: float
    """Part of the samples that ended with EOS."""


METRICS: dict[str, type[Metrics]] = {
    "base_model": BaseModelMetrics, "sft": SFTMetrics, "reward_model": RewardModelMetrics, "rollout": RolloutMetrics,
    "reference": ReferenceMetrics, "reward": RewardMetrics, "value": ValueMetrics, "gae": GAEMetrics,
    "ppo": PPOMetrics, "evaluate": EvaluateMetrics,
}
