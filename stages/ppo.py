"""PPO: the clipped policy update and the value regression, several epochs of minibatches over one batch.

A token's loss is  w·max(−ratio·A, −clip(ratio)·A) + c_V·½·max(…)² − c_H·H + β·kl,   ratio = π(token)/π_old(token)
(Schulman et al. 2017, https://arxiv.org/abs/1707.06347), or with `objective: a2c` −log π(token)·A in the first term's place.
By default w = 1, c_V = 1, c_H = 0 and β = 0 (the KL is in the reward), and a minibatch's loss is the mean over its tokens.
Added to it is c_ptx times the language-modelling loss of some texts (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155,
equation 2). What a token is, and what minibatches are drawn from, responses or single steps, is the learner's to say.
A minibatch may be cut into micro-batches whose gradients add up, in this process or over several (stages/ops/ranks.py).
Dropout is off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from schemas.errors import NonFiniteError
from schemas.metrics import PPOMetrics
from schemas.settings import PPOConfig
from schemas.tables import Advantages, Ragged, ReferenceLogprobs, Rollouts, Trajectories, Values, require_aligned
from stages.ops import ranks
from stages.ops.advantages import whiten
from stages.ops.device import bound_to_cores
from stages.ops.finite import require_finite
from stages.ops.kl import kl_estimate
from stages.ops.learner import Learner, MicroBatch, Prediction, Units
from stages.ops.losses import LOG_RATIO_LIMIT, a2c_loss, log_ratio, policy_loss, value_loss
from stages.ops.progress import progress_bar
from stages.ops.ratios import say_ratios
from stages.ops.tally import Tally
from stages.ops.texts import Texts


@dataclass(frozen=True)
class KLLoss:
    """The KL penalty where it is part of the loss."""

    reference: ReferenceLogprobs
    coef: float  # β
    estimator: str  # k2 or k3


@bound_to_cores()
def ppo(
    learner: Learner, rollouts: Rollouts | Trajectories, values: Values | Trajectories | None, advantages: Advantages,
    config: PPOConfig, *, seed: int, learning_rate_factor: float = 1.0, train_actor: bool = True,
    kl_loss: KLLoss | None = None, texts: Texts | None = None,
) -> PPOMetrics:
    """Trains the learner in place.

    `values`: of the learner's critic, None if it has none; `train_actor`: False in a critic warm-up; `texts`: what
    `ptx_coef` mixes in. Raises `TableError` on misaligned tables, `NonFiniteError` with the rows.
    """
    for table in (values, advantages, kl_loss and kl_loss.reference):
        if table is not None:
            require_aligned(rollouts, table)
    units, per_response = learner.units(rollouts), config.loss_aggregation == "sequence"
    old, importance = _old_logprobs(learner, units, rollouts, config) if train_actor else (rollouts.logprobs, None)
    columns = _Columns(
        learner.device, old_logprobs=old, advantages=advantages.advantages, returns=advantages.returns,
        importance=importance, old_values=values and values.values, reference=kl_loss and kl_loss.reference.logprobs,
        per_response=old.with_values((1 / units.lengths)[units.of_token]) if per_response else None)
    update = _Update(learner, units, rollouts, columns, config, learning_rate_factor, train_actor, kl_loss,
                     learner.units(texts) if texts else None)
    order, tally = np.random.Generator(np.random.Philox(seed)), Tally()
    with progress_bar(total=config.epochs * config.minibatches, desc="ppo") as bar:
        for epoch in range(config.epochs):
            for i, minibatch in enumerate(np.array_split(order.permutation(len(units.lengths)), config.minibatches)):
                mixed = order.integers(len(texts), size=config.ptx_batch_size) if texts and train_actor else None
                update.step(minibatch, mixed, tally, epoch, _hint(epoch, i, config))
                bar.update()
                if config.target_kl is not None and tally.approx_kl() > config.target_kl:
                    return tally.metrics(learning_rate_factor, _measured(importance, rollouts.sampled, config))
    return tally.metrics(learning_rate_factor, _measured(importance, rollouts.sampled, config))


class _Columns:
    """What is known of each token of the batch, gathered for a minibatch in one call."""

    def __init__(self, device: torch.device, **ragged: Ragged | None) -> None:
        """(n,) each, by name; those there are."""
        there = {name: rows.values.astype(np.float32, copy=False) for name, rows in ragged.items() if rows is not None}
        self.names, self.table = tuple(there), torch.from_numpy(np.stack(list(there.values()))).to(device)

    def of(self, token_index: np.ndarray) -> dict[str, Tensor]:
        """(m,) float32 of each column, by name."""
        columns = self.table.index_select(1, torch.from_numpy(token_index).to(self.table.device))
        return dict(zip(self.names, columns.unbind(), strict=True))


# --- recomputed old logprobs ---

def _old_logprobs(
    learner: Learner, units: Units, rollouts: Rollouts | Trajectories, config: PPOConfig
) -> tuple[Ragged, Ragged | None]:
    """log π_old of every token, and π_old/π_rollout if π_old is recomputed (Yao et al. 2025, truncated importance
    sampling, https://fengyao.notion.site/off-policy-rl)."""
    if not config.recompute_old_logprobs:
        return rollouts.logprobs, None
    flat = np.zeros_like(rollouts.logprobs.values)
    batches = units.micro_batches(np.arange(len(units.lengths)))
    with torch.no_grad():
        for place, counts in ranks.dealt(len(batches)):
            logprobs = learner.predict(batches[place], critic=False).logprobs
            if counts:
                flat[batches[place].token_index] = logprobs.cpu().numpy()
    old = rollouts.logprobs.with_values(ranks.summed(torch.from_numpy(flat).to(learner.device)).cpu().numpy())
    require_finite("the recomputed logprob", old, rollouts.row_id)
    moved = np.clip(old.values - rollouts.logprobs.values, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return old, old.with_values(np.exp(moved))


def _measured(importance: Ragged | None, sampled: Ragged | None, config: PPOConfig) -> dict[str, float]:
    """Metrics of the importance weights."""
    if importance is None:
        return {}
    weights, cap = importance.values.astype(np.float64), config.importance_cap or np.inf
    weights = weights if sampled is None else weights[sampled.values]
    return {"importance_weight": np.minimum(weights, cap).mean(), "importance_weight_max": weights.max(),
            "importance_cap_fraction": (weights > cap).mean()}


# --- one optimizer step ---

@dataclass(frozen=True)
class _Update:
    """What all minibatches of an update share."""

    learner: Learner
    units: Units
    rollouts: Rollouts | Trajectories
    columns: _Columns
    config: PPOConfig
    learning_rate_factor: float
    train_actor: bool
    kl_loss: KLLoss | None
    texts: Units | None

    def step(self, minibatch: np.ndarray, mixed: np.ndarray | None, tally: Tally, epoch: int, hint: str) -> None:
        """On those units, and on those texts; `hint`: for the message where a number is not finite."""
        batches, heard = self.units.micro_batches(minibatch), []
        index = np.concatenate([batch.token_index for batch in batches]) if len(batches) > 1 else batches[0].token_index
        column = self.columns.of(index)
        if self.config.whiten_minibatches:
            column["advantages"] = whiten(column["advantages"])
        ends = np.cumsum([len(batch.token_index) for batch in batches])
        for place, counts in ranks.dealt(len(batches)):
            batch, begin, end = batches[place], ends[place] - len(batches[place].token_index), ends[place]
            part = {name: values[begin:end] for name, values in column.items()} if len(batches) > 1 else column
            prediction = self.learner.predict(
                batch, policy=self.train_actor, entropy="gradient" if self.config.entropy_coef else "value")
            loss, measured = self._loss(prediction, part)
            if counts:
                tally.add(**measured)
            if counts and prediction.logprobs is not None:
                heard.append((batch.token_index, measured["log_ratio"], measured["clip_fraction_loss"]))
            mean = loss.sum() / len(index)
            if "per_response" in part:
                mean = (loss * part["per_response"]).sum() / len(minibatch)
            _require_finite_loss(mean, loss, self.rollouts, batch, hint)
            (mean if counts else 0 * mean).backward()
        if mixed is not None:
            self._mix_in(mixed, tally)
        say_ratios(epoch, heard)
        norms = self.learner.step(self.learning_rate_factor)
        for network, norm in norms.items():
            if not math.isfinite(norm):
                rows = np.unique(self.rollouts.logprobs.row_of_value[index])
                require_finite(f"the {network}'s gradient norm", np.full(len(rows), norm), self.rollouts.row_id[rows], hint)
        tally.end_step(norms)

    def _loss(self, prediction: Prediction, column: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
        """(m,): the loss of each token; and what is measured of them."""
        loss, measured = 0.0, {}
        if prediction.logprobs is not None:
            loss, measured = self._policy(prediction, column)
        if prediction.values is not None:
            clip = value_loss(prediction.values, column["old_values"], column["returns"], self.config.value_clip_range)
            loss = loss + self.config.value_coef * clip.loss
            measured |= {"value_loss": clip.loss, "value_clip_fraction": clip.outside,
                         "value_clip_fraction_loss": clip.taken}
        return loss, measured

    def _policy(
        self, prediction: Prediction, column: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """(m,) policy loss, entropy bonus and KL penalty; and what is measured of them."""
        c, log_r = self.config, log_ratio(prediction.logprobs, column["old_logprobs"])
        if c.objective == "a2c":
            clip = a2c_loss(prediction.logprobs, column["advantages"])
        else:
            clip = policy_loss(log_r, column["advantages"], c.clip_range_low, c.clip_range_high, c.dual_clip)
        policy, kl = clip.loss, None
        if c.importance_cap is not None:
            policy = policy * column["importance"].clamp(max=c.importance_cap)
        loss = policy - c.entropy_coef * prediction.entropy if c.entropy_coef else policy
        if self.kl_loss is not None:
            kl = kl_estimate(log_ratio(column["reference"], prediction.logprobs), self.kl_loss.estimator)
            loss = loss + self.kl_loss.coef * kl
        return loss, {
            "policy_loss": policy, "entropy": prediction.entropy, "log_ratio": log_r, "clip_fraction": clip.outside,
            "clip_fraction_loss": clip.taken, "dual_clip_fraction": clip.bounded, "kl_loss": kl}

    def _mix_in(self, mixed: np.ndarray, tally: Tally) -> None:
        """The gradient of c_ptx·mean(−log π) over the texts' tokens."""
        total = int(self.texts.lengths[mixed].sum())
        batches = self.texts.micro_batches(mixed)
        for place, counts in ranks.dealt(len(batches)):
            loss = -self.learner.log_likelihood(batches[place])
            if counts:
                tally.add(ptx_loss=loss)
            (counts * self.config.ptx_coef * loss.sum() / total).backward()


def _hint(epoch: int, minibatch: int, config: PPOConfig) -> str:
    """Where in the update a number is not finite, the likely cause, and what to change."""
    where = f", in epoch {epoch + 1}, minibatch {minibatch + 1} of {config.minibatches}"
    if epoch == minibatch == 0:
        return (f"{where}, before any step of this update: the weights or the scores that it begins with are extreme; look "
                "at the iteration before, or bound the scores with reward.clip")
    return (f"{where}: the steps before it have made the weights extreme; lower ppo.learning_rate={config.learning_rate:g} "
            f"or ppo.critic_learning_rate={config.critic_learning_rate or config.learning_rate:g}")


def _require_finite_loss(
    mean: Tensor, loss: Tensor, rollouts: Rollouts | Trajectories, batch: MicroBatch, hint: str
) -> None:
    """Raises `NonFiniteError` with the rows whose tokens' loss is not finite, or all if only their sum is not."""
    if not math.isfinite(mean.item()):
        flat = np.zeros(len(rollouts.logprobs.values), np.float32)
        flat[batch.token_index] = loss.detach().cpu().numpy()
        require_finite("the loss", rollouts.logprobs.with_values(flat), rollouts.row_id, hint)
        rows = np.unique(rollouts.logprobs.row_of_value[batch.token_index])
        raise NonFiniteError(f"the summed loss overflowed in rows {rollouts.row_id[rows].tolist()}{hint}")
