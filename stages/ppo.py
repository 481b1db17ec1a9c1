"""PPO: the clipped policy update and the value regression, several epochs of minibatches over one batch.

A token's loss is  w·max(−ratio·A, −clip(ratio)·A) + c_V·½·max(…)² − c_H·H + β·kl,   ratio = π(token)/π_old(token)
(Schulman et al. 2017, https://arxiv.org/abs/1707.06347). By default w = 1, c_V = 1, c_H = 0 and β = 0 (the KL is in the
reward), and a minibatch's loss is the mean over its tokens. Added to it is c_ptx times the language-modelling loss of some
texts (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 2). Actor and critic are separate networks with an
optimizer each. Rows are cut into minibatches, and a minibatch into micro-batches whose gradients add up. Dropout is off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from schemas.errors import NonFiniteError
from schemas.metrics import PPOMetrics
from schemas.settings import PPOConfig
from schemas.tables import Advantages, Ragged, ReferenceLogprobs, Rollouts, Values, require_aligned
from stages.ops.finite import require_finite
from stages.ops.kl import kl_estimate
from stages.ops.learner import Learner, MicroBatch, Prediction
from stages.ops.losses import LOG_RATIO_LIMIT, log_ratio, policy_loss, value_loss
from stages.ops.prompts import Texts
from stages.ops.tally import Tally

VERSION = 2


@dataclass(frozen=True)
class KLLoss:
    """The KL penalty where it is part of the loss."""

    reference: ReferenceLogprobs
    coef: float  # β
    estimator: str  # k2 or k3


def ppo(
    learner: Learner, rollouts: Rollouts, values: Values | None, advantages: Advantages, config: PPOConfig, *, seed: int,
    learning_rate_factor: float = 1.0, train_actor: bool = True, kl_loss: KLLoss | None = None, texts: Texts | None = None,
) -> PPOMetrics:
    """Trains the learner in place.

    `values`: of the learner's critic, None if it has none; `train_actor`: False in a critic warm-up; `texts`: what
    `ptx_coef` mixes in. Raises `TableError` on misaligned tables, `NonFiniteError` with the rows.
    """
    for table in (values, advantages, kl_loss and kl_loss.reference):
        if table is not None:
            require_aligned(rollouts, table)
    old, importance = _old_logprobs(learner, rollouts, config) if train_actor else (rollouts.logprobs, None)
    update = _Update(learner, rollouts, config, learning_rate_factor, train_actor, kl_loss, texts, _columns(
        old_logprobs=old, advantages=advantages.advantages, returns=advantages.returns, importance=importance,
        old_values=values and values.values, reference=kl_loss and kl_loss.reference.logprobs))
    order, tally = np.random.Generator(np.random.Philox(seed)), Tally()
    with tqdm(total=config.epochs * config.minibatches, desc="ppo", leave=False, disable=None) as bar:
        for _ in range(config.epochs):
            for rows in np.array_split(order.permutation(len(rollouts)), config.minibatches):
                mixed = order.integers(len(texts), size=config.ptx_batch_size) if texts and train_actor else None
                kl = update.step(rows, mixed, tally)
                bar.update()
                if config.target_kl is not None and kl > config.target_kl:
                    return tally.metrics(learning_rate_factor, _measured(importance, config))
    return tally.metrics(learning_rate_factor, _measured(importance, config))


def _columns(**ragged: Ragged | None) -> dict[str, np.ndarray]:
    """(n,) float32 over all response tokens of the batch, by name; those there are."""
    return {name: rows.values for name, rows in ragged.items() if rows is not None}


# --- recomputed old logprobs ---

def _old_logprobs(learner: Learner, rollouts: Rollouts, config: PPOConfig) -> tuple[Ragged, Ragged | None]:
    """log π_old of every token, and π_old/π_rollout if π_old is recomputed (Yao et al. 2025, truncated importance
    sampling, https://fengyao.notion.site/off-policy-rl)."""
    if not config.recompute_old_logprobs:
        return rollouts.logprobs, None
    flat = np.empty_like(rollouts.logprobs.values)
    with torch.inference_mode():
        for batch in learner.micro_batches(rollouts, np.arange(len(rollouts))):
            flat[batch.tokens] = learner.predict(batch, critic=False).logprobs.cpu().numpy()
    old = rollouts.logprobs.with_values(flat)
    require_finite("the recomputed logprob", old, rollouts.row_id)
    moved = np.clip(flat - rollouts.logprobs.values, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return old, old.with_values(np.exp(moved))


def _measured(importance: Ragged | None, config: PPOConfig) -> dict[str, float]:
    """Metrics of the importance weights."""
    if importance is None:
        return {}
    weights, cap = importance.values.astype(np.float64), config.importance_cap or np.inf
    return {"importance_weight": np.minimum(weights, cap).mean(), "importance_weight_max": weights.max(),
            "importance_cap_fraction": (weights > cap).mean()}


# --- one optimizer step ---

@dataclass(frozen=True)
class _Update:
    """What all minibatches of an update share."""

    learner: Learner
    rollouts: Rollouts
    config: PPOConfig
    learning_rate_factor: float
    train_actor: bool
    kl_loss: KLLoss | None
    texts: Texts | None
    columns: dict[str, np.ndarray]  # (n,) each, over all response tokens of the batch

    def step(self, rows: np.ndarray, mixed: np.ndarray | None, tally: Tally) -> float:
        """On a minibatch, and on those texts; the minibatch's approximate KL before the step, nats a token."""
        weights = self._weights(rows)
        for batch in self.learner.micro_batches(self.rollouts, rows):
            prediction = self.learner.predict(batch, policy=self.train_actor, entropy_gradient=self.config.entropy_coef > 0)
            loss = self._loss(prediction, batch, tally)
            _require_finite_rows(loss, self.rollouts, batch)
            (loss * torch.from_numpy(weights[batch.tokens]).to(loss)).sum().backward()
        if mixed is not None:
            self._mix_in(mixed, tally)
        norms = self.learner.step(self.learning_rate_factor)
        for network, norm in norms.items():
            require_finite(f"the {network}'s gradient norm", np.array([norm] * len(rows)), self.rollouts.row_id[rows])
        return tally.end_step(norms)

    def _weights(self, rows: np.ndarray) -> np.ndarray:
        """(n,) float64: each token's part in the loss of the minibatch, however it is cut; they sum to 1 over it."""
        lengths = self.rollouts.response_tokens.lengths
        if self.config.loss_aggregation == "token":
            return np.full(lengths.sum(), 1 / lengths[rows].sum())
        return np.repeat(1 / (len(rows) * lengths), lengths)

    def _loss(self, prediction: Prediction, batch: MicroBatch, tally: Tally) -> Tensor:
        """(n,): the loss of each token."""
        column = {name: torch.from_numpy(values[batch.tokens]).to(prediction.device)
                  for name, values in self.columns.items()}
        policy = self._policy(prediction, column, tally) if prediction.logprobs is not None else 0.0
        value = self._value(prediction.values, column, tally) if prediction.values is not None else 0.0
        return policy + value

    def _policy(self, prediction: Prediction, column: dict[str, Tensor], tally: Tally) -> Tensor:
        """Policy loss, entropy bonus and KL penalty: (n,)."""
        c, log_r = self.config, log_ratio(prediction.logprobs, column["old_logprobs"])
        clip = policy_loss(log_r, column["advantages"], c.clip_range_low, c.clip_range_high, c.dual_clip)
        policy, kl = clip.loss, None
        if c.importance_cap is not None:
            policy = policy * column["importance"].clamp(max=c.importance_cap)
        loss = policy - c.entropy_coef * prediction.entropy
        if self.kl_loss is not None:
            kl = kl_estimate(log_ratio(column["reference"], prediction.logprobs), self.kl_loss.estimator)
            loss = loss + self.kl_loss.coef * kl
        with torch.no_grad():
            tally.ratio(log_r.exp())
            tally.add(policy_loss=policy, entropy=prediction.entropy, approx_kl=kl_estimate(log_r, "k3"),
                      approx_kl_k1=kl_estimate(log_r, "k1"), clip_fraction=clip.outside, clip_fraction_loss=clip.taken,
                      dual_clip_fraction=clip.bounded, kl_loss=kl)
        return loss

    def _value(self, values: Tensor, column: dict[str, Tensor], tally: Tally) -> Tensor:
        """Value loss: (n,)."""
        clip = value_loss(values, column["old_values"], column["returns"], self.config.value_clip_range)
        tally.add(value_loss=clip.loss.detach(), value_clip_fraction=clip.outside, value_clip_fraction_loss=clip.taken)
        return self.config.value_coef * clip.loss

    def _mix_in(self, rows: np.ndarray, tally: Tally) -> None:
        """The gradient of c_ptx·mean(−log π) over the texts' tokens."""
        total = int(self.texts.response_tokens.lengths[rows].sum())
        for batch in self.learner.micro_batches(self.texts, rows):
            loss = -self.learner.log_likelihood(batch)
            tally.add(ptx_loss=loss.detach())
            (self.config.ptx_coef * loss.sum() / total).backward()


def _require_finite_rows(loss: Tensor, rollouts: Rollouts, batch: MicroBatch) -> None:
    """Raises `NonFiniteError` with the rows whose tokens' loss is not finite."""
    if not torch.isfinite(loss.detach().sum()):
        flat = np.zeros(len(rollouts.logprobs.values), np.float32)
        flat[batch.tokens] = loss.detach().cpu().numpy()
        require_finite("the loss", rollouts.logprobs.with_values(flat), rollouts.row_id)
        raise NonFiniteError(f"the summed loss overflowed in rows {rollouts.row_id[batch.rows].tolist()}")
