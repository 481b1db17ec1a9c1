"""One record per stage; every metric is defined where it is declared.

A metric is logged as `stage/name`. Means over tokens are over response tokens, EOS included where it was sampled; in a
control task a step takes the place of a token.
Beside these every stage has `seconds`, `bytes` and, where a model ran, `tokens_per_second`, from its manifest.
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


class DataMetrics(Metrics):
    """What became of a source of data when it was imported; kept in the manifest of the input."""

    rows: int
    """Rows that are there."""
    ties: int
    """Pairs that were dropped, since neither response was preferred (`ties`)."""
    too_long: int
    """Rows that were dropped, since they were too long (`data.too_long`)."""
    cut: int
    """Prompts that lost their beginning, since they were too long."""


class BroughtModelMetrics(Metrics):
    """What the check at the start found out about a model that is brought; kept in the manifest of the input."""

    parameters: int
    """Numbers that are trained, shared ones once."""
    vocab_size: int
    """Entries of the tokenizer."""
    embeddings: int
    """Token ids that the model has."""
    context_length: int | None
    """The most tokens of prompt and response; none where the family has no limit."""
    pads: bool
    """Whether rows of several lengths may be padded on the left (see stages/ops/abilities.py), as the next two 0 or 1."""
    caches: bool
    """Whether a step may begin from a cache."""
    trims: bool
    """Whether rows may leave the cache."""
    splits: bool = True
    """Whether the output head may run on some positions at a time."""


class BroughtScorerMetrics(Metrics):
    """What the check at the start found out about a reward model or critic that is brought; kept in the input's manifest."""

    parameters: int
    """Numbers of the model, shared ones once."""
    vocab_size: int
    """Entries of its tokenizer."""
    embeddings: int
    """Token ids that it has."""
    max_tokens: int | None
    """The most tokens of a text; none where it has no limit."""


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
    """Fraction of the held-out pairs whose chosen response is scored higher."""
    heldout_margin: float
    """r_chosen − r_rejected, mean over held-out pairs."""


class RolloutMetrics(Metrics):
    response_length: float
    """R, mean; of several turns the sampled tokens."""
    response_length_max: int
    """R of the longest response."""
    eos_fraction: float
    """Fraction of the responses that ended by themselves: with EOS, or at a stop string or token."""
    logprob: float
    """log π_old of a sampled token, nats, mean; its negative estimates the entropy."""
    turns: float | None = None
    """Assistant's turns of a conversation, mean; none where there is but one."""


class ReferenceMetrics(Metrics):
    logprob: float
    """log π_ref of a sampled token, nats, mean."""


class RewardBiasMetrics(Metrics):
    bias: float
    """Weighted sum of a demonstration's components, mean."""
    bias_std: float
    """Standard deviation of the weighted sums (n − 1)."""


class RewardMetrics(Metrics):
    score: float
    """Score of a response, mean."""
    score_std: float
    """Standard deviation of the scores (n − 1)."""
    score_min: float
    """Lowest score."""
    score_max: float
    """Highest score."""
    raw_score: float
    """Weighted sum less bias, before it is normalised, clipped or penalised, mean."""
    component: dict[str, float]
    """Each component before its weight, mean."""
    cut: dict[str, int] = {}
    """Texts that were longer than a reward model that was brought takes, of each such component."""
    running_count: float | None
    """Scores in the running moments, this batch's included; given where scores are normalised, as the next two."""
    running_mean: float | None
    """Mean of all raw scores so far."""
    running_std: float | None
    """Standard deviation of all raw scores so far (÷ count)."""


class ResampleMetrics(Metrics):
    responses: int
    """Responses that were sampled for the batch, those of `rollout` included."""
    rounds: int
    """Rounds of sampling that there were, `rollout` the first."""
    dropped_groups: int
    """Groups that were sampled and are not in the batch."""
    flat_groups: int
    """Groups in the batch whose responses all have one score, since the rounds did not suffice."""
    score: float
    """Score of a response in the batch, mean."""


class ValueMetrics(Metrics):
    value: float
    """V(s_t), mean over tokens."""
    value_std: float
    """Standard deviation of V(s_t) over tokens."""


class PolicyMetrics(Metrics):
    actor_parameters: int
    """Trainable numbers of the actor."""
    critic_parameters: int
    """Trainable numbers of the critic."""


class ControlRolloutMetrics(Metrics):
    episode_return: float | None = None
    """Σ of raw rewards of an episode, mean over those that ended in this batch; not given if none did."""
    episode_length: float | None = None
    """Steps of an episode, mean over those that ended in this batch."""
    episodes: int
    """Episodes that ended in this batch."""
    steps: int
    """Steps of all environments."""
    raw_reward: float
    """The environment's reward of a step, mean."""
    logprob: float
    """log π_old(a_t | o_t), nats, mean."""
    value: float
    """V(o_t), mean over steps."""
    value_std: float
    """Standard deviation of V(o_t) over steps."""
    action_clip_fraction: float | None = None
    """Fraction of the sampled numbers that lay outside the bounds of a Box."""
    running_count: float | None = None
    """Steps in the running moments, this batch's included; given where rewards are scaled, as the next two."""
    running_mean: float | None = None
    """Mean of all discounted returns so far."""
    running_std: float | None = None
    """Standard deviation of all discounted returns so far (÷ count)."""


class ControlEvaluateMetrics(Metrics):
    episode_return: float
    """Σ of raw rewards of an episode with the most likely actions, mean."""
    episode_return_std: float
    """Standard deviation over episodes (n − 1)."""
    episode_return_min: float
    """The worst episode."""
    episode_return_max: float
    """The best episode."""
    episode_length: float
    """Steps of an episode, mean."""


class GAEMetrics(Metrics):
    kl: float | None
    """KL estimate to the reference, nats a response, mean; given where there is a reference, as the next two."""
    kl_per_token: float | None
    """KL estimate to the reference, nats a token, mean."""
    kl_coef: float | None
    """β that was applied."""
    reward: float
    """Σ_t r_t of a row, a response or a piece of an episode, mean: of a response its score minus β times KL where the KL
    is in the reward; of whitened r_t if they are."""
    advantage_mean: float
    """A_t before whitening, mean over tokens."""
    advantage_std: float
    """A_t before whitening, standard deviation over tokens."""
    return_mean: float
    """returns_t, mean over tokens."""
    return_std: float
    """returns_t, standard deviation over tokens."""
    explained_variance: float | None
    """1 − Var(returns − V)/Var(returns) over tokens; not given without a critic or where returns do not vary."""
    equal_groups: float | None
    """Fraction of the prompts whose responses all have one Σ_t r_t, and so nothing to compare; where they are compared."""


class PPOMetrics(Metrics):
    """Means over the tokens of all minibatches, each measured before its own step, unless said otherwise.

    What was not computed is left out: the policy's in a critic warm-up, the critic's where there is none.
    """

    policy_loss: float | None = None
    """max(−ratio·A, −clip(ratio)·A), with the bound of `dual_clip` and the importance weight."""
    value_loss: float | None = None
    """½·max of the clipped and unclipped squared error."""
    kl_loss: float | None = None
    """KL estimate of the trained policy to the reference, nats a token; where the KL is in the loss."""
    ptx_loss: float | None = None
    """−log π of a token of the texts mixed in, nats."""
    entropy: float | None = None
    """Entropy of the policy's next-token distribution, nats."""
    approx_kl: float | None = None
    """KL of the old policy to the updated one, k3 = (ratio − 1) − log ratio, nats a token."""
    approx_kl_k1: float | None = None
    """The same by k1 = −log ratio."""
    approx_kl_final: float | None = None
    """approx_kl in the last minibatch alone."""
    clip_fraction: float | None = None
    """Fraction of the tokens with ratio outside [1 − ε_low, 1 + ε_high]."""
    clip_fraction_loss: float | None = None
    """Fraction of the tokens whose loss is the clipped one, so that they give no gradient."""
    dual_clip_fraction: float | None = None
    """Fraction of the tokens whose loss is the bound of `dual_clip`."""
    value_clip_fraction: float | None = None
    """Fraction of the tokens with |V − V_old| above `value_clip_range`."""
    value_clip_fraction_loss: float | None = None
    """Fraction of the tokens whose value loss is the clipped square, the larger one."""
    ratio_min: float | None = None
    """Least ratio seen."""
    ratio_max: float | None = None
    """Greatest ratio seen."""
    importance_weight: float | None = None
    """min(π_old/π_rollout, C), mean over the batch; given with recomputed old logprobs, as the next two."""
    importance_weight_max: float | None = None
    """Greatest π_old/π_rollout, before the cap."""
    importance_cap_fraction: float | None = None
    """Fraction of the tokens that the cap held."""
    grad_norm_actor: float | None = None
    """Norm of the actor's gradient before clipping, mean over steps."""
    grad_norm_critic: float | None = None
    """Norm of the critic's gradient before clipping, mean over steps."""
    learning_rate_factor: float
    """What both learning rates were multiplied with."""
    steps: int
    """Optimizer steps taken; fewer than epochs × minibatches where target_kl ended the update."""


class EvaluateMetrics(Metrics):
    gold: float
    """The judge's score of a held-out sample, mean (the reward where no judge is set)."""
    gold_std: float
    """Its standard deviation over samples (n − 1)."""
    gold_low: float
    """Lower end of the 95% interval of its mean, by the bootstrap over prompts."""
    gold_high: float
    """Upper end."""
    score: float
    """raw_score of a held-out sample, mean."""
    kl: float
    """Σ_t log π − log π_ref of a held-out sample, nats, mean."""
    win_rate: float
    """Fraction of the prompts whose sample beats the baseline's by gold; ties count half."""
    win_rate_low: float
    """Lower end of its 95% interval."""
    win_rate_high: float
    """Upper end."""
    response_length: float
    """R, mean."""
    eos_fraction: float
    """Fraction of the samples that ended by themselves."""
    judge: dict[str, float] = {}
    """Mean of each judge, where there are several."""
    greedy_gold: float | None = None
    """Gold of the responses of the likeliest tokens, mean."""
    greedy_score: float | None = None
    """Their raw_score, mean."""
    pass_at: dict[str, float] = {}
    """k → chance that one of k samples of a prompt is right."""
    best_of: dict[str, float] = {}
    """k → gold of the best by score of k samples of a prompt: what sampling more would give without training."""
    cut: dict[str, int] = {}
    """Texts that were longer than a reward model that was brought takes, of each such component."""
