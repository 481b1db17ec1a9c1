"""PPO: the clipped policy update and the value regression, several epochs of minibatches over one batch.

loss = mean over the minibatch's tokens of  −min(ratio·A, clip(ratio)·A) + ½·max(…)² − c_H·H,
ratio = π(token)/π_old(token) (Schulman et al. 2017, https://arxiv.org/abs/1707.06347). Actor and critic are separate
networks with an optimizer each, so that the value loss needs no coefficient. Rows are cut into minibatches, and a
minibatch into micro-batches whose gradients add up to the exact mean over its tokens. Dropout is off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from schemas.config import PPOConfig
from schemas.errors import NonFiniteError
from schemas.metrics import PPOMetrics
from schemas.tables import Advantages, Rollouts, Values, require_aligned
from stages.ops.finite import require_finite
from stages.ops.learner import Learner, MicroBatch, Prediction
from stages.ops.losses import approx_kl, log_ratio, policy_loss, value_loss

VERSION = 1


@dataclass(frozen=True)
class Targets:
    """What the update compares the models with: (n,) float32 over all response tokens of the batch."""

    old_logprobs: np.ndarray
    old_values: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray

    def of(self, batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Those of the micro-batch's tokens."""
        columns = (self.old_logprobs, self.old_values, self.advantages, self.returns)
        return tuple(torch.from_numpy(column[batch.tokens]).to(device) for column in columns)


def ppo(
    learner: Learner, rollouts: Rollouts, values: Values, advantages: Advantages, config: PPOConfig, *, seed: int
) -> PPOMetrics:
    """Trains the learner in place. Raises `TableError` on misaligned tables, `NonFiniteError` with the rows."""
    for table in (values, advantages):
        require_aligned(rollouts, table)
    targets = Targets(rollouts.logprobs.values, values.values.values, advantages.advantages.values,
                      advantages.returns.values)
    order = np.random.Generator(np.random.Philox(seed))
    tally = _Tally()
    with tqdm(total=config.epochs * config.minibatches, desc="ppo", leave=False, disable=None) as bar:
        for _ in range(config.epochs):
            for rows in np.array_split(order.permutation(len(rollouts)), config.minibatches):
                kl = _step(learner, rollouts, rows, targets, config, tally)
                bar.update()
                if config.target_kl is not None and kl > config.target_kl:
                    return tally.metrics()
    return tally.metrics()


def _step(
    learner: Learner, rollouts: Rollouts, rows: np.ndarray, targets: Targets, config: PPOConfig, tally: _Tally
) -> float:
    """One optimizer step on a minibatch; its approximate KL before the step, nats a token."""
    total = int(rollouts.response_tokens.lengths[rows].sum())
    tally.begin(total)
    for batch in learner.micro_batches(rollouts, rows):
        prediction = learner.predict(batch, entropy_gradient=config.entropy_coef > 0)
        loss = _loss(prediction, targets.of(batch, prediction.logprobs.device), config, tally)
        _require_finite_rows(loss, rollouts, batch)
        (loss.sum() / total).backward()
    norms = learner.step()
    for network, norm in norms.items():
        require_finite(f"the {network}'s gradient norm", np.array([norm] * len(rows)), rollouts.row_id[rows])
    return tally.end(norms)


def _loss(
    prediction: Prediction, target: tuple[Tensor, Tensor, Tensor, Tensor], config: PPOConfig, tally: _Tally
) -> Tensor:
    """(n,): the loss of each token."""
    old_logprobs, old_values, advantages, returns = target
    log_r = log_ratio(prediction.logprobs, old_logprobs)
    policy = policy_loss(log_r, advantages, config.clip_range_low, config.clip_range_high)
    value, value_clipped = value_loss(prediction.values, old_values, returns, config.value_clip_range)
    with torch.no_grad():
        ratio = log_r.exp()
        outside = (ratio < 1 - config.clip_range_low) | (ratio > 1 + config.clip_range_high)
        tally.add(ratio, policy_loss=policy, value_loss=value, entropy=prediction.entropy, approx_kl=approx_kl(log_r),
                  approx_kl_k1=-log_r, clip_fraction=outside, value_clip_fraction=value_clipped)
    return policy + value - config.entropy_coef * prediction.entropy


def _require_finite_rows(loss: Tensor, rollouts: Rollouts, batch: MicroBatch) -> None:
    """Raises `NonFiniteError` with the rows whose tokens' loss is not finite."""
    if not torch.isfinite(loss.detach().sum()):
        flat = np.zeros(len(rollouts.logprobs.values), np.float32)
        flat[batch.tokens] = loss.detach().cpu().numpy()
        require_finite("the loss", rollouts.logprobs.with_values(flat), rollouts.row_id)
        raise NonFiniteError(f"the summed loss overflowed in rows {rollouts.row_id[batch.rows].tolist()}")


class _Tally:
    """Sums over tokens and steps, from which `PPOMetrics` are the means."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.norms: dict[str, list[float]] = {"actor": [], "critic": []}
        self.tokens, self.ratio_min, self.ratio_max = 0, np.inf, -np.inf

    def begin(self, tokens: int) -> None:
        self.step_tokens, self.step_kl = tokens, 0.0

    def add(self, ratio: Tensor, **columns: Tensor) -> None:
        """Of one micro-batch: (n,) each."""
        for name, column in columns.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(column.sum(dtype=torch.float64))
        self.step_kl += float(columns["approx_kl"].sum(dtype=torch.float64))
        self.tokens += len(ratio)
        self.ratio_min, self.ratio_max = min(self.ratio_min, float(ratio.min())), max(self.ratio_max, float(ratio.max()))

    def end(self, norms: dict[str, float]) -> float:
        for network, norm in norms.items():
            self.norms[network].append(norm)
        return self.step_kl / self.step_tokens

    def metrics(self) -> PPOMetrics:
        return PPOMetrics(
            **{name: total / self.tokens for name, total in self.sums.items()},
            approx_kl_final=self.step_kl / self.step_tokens, ratio_min=self.ratio_min, ratio_max=self.ratio_max,
            grad_norm_actor=np.mean(self.norms["actor"]), grad_norm_critic=np.mean(self.norms["critic"]),
            steps=len(self.norms["actor"]))
