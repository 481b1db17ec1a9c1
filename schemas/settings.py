"""The settings of the stages: one frozen class each, a doc string per field, unknown keys refused.

Everything in a stage's class decides its result and is part of the identity of what it writes.
`ExecutionConfig` holds what only decides where and how fast it runs, `TrackingConfig` where it is mirrored to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from schemas.addresses import Address
from schemas.stages import STAGES, Kind

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"


Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class Settings(BaseModel):
    """Base of all settings: immutable, strict about keys, documented by the strings below its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Later:
    """Marks a setting that a section did not have at first, and says what held before. At that it is left out of a call, and
    a run that was made before has it, so that calls and runs of then are the same."""

    before: Any


def later_settings(section: type[Settings]) -> dict[str, Any]:
    """Name → what held before there was the setting, of those that are marked `Later`."""
    return {name: mark.before for name, field in section.model_fields.items() for mark in field.metadata
            if isinstance(mark, Later)}


class KLConfig(Settings):
    """What keeps the actor near the reference: β·KL(π‖π_ref), estimated token by token."""

    coef: float = Field(0.05, ge=0)
    """β, per nat; where it starts, if `target` is set."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of a token's KL (Schulman 2020); k1 is log π − log π_ref."""
    placement: Literal["reward", "loss"] = "reward"
    """`reward`: r_t holds −β·kl_t of the rollout's policy. `loss`: the update adds β·kl_t of the policy it trains."""
    target: PositiveFloat | None = None
    """Nats a response to which β is adapted from iteration to iteration (Ziegler et al. 2019); null keeps β."""
    horizon: PositiveFloat = 10_000
    """Responses after which a KL 20% off `target`, or more, would have changed β by a fifth; smaller adapts faster."""
    measure: bool = True
    """With `coef` 0: whether the reference is run all the same, so that the KL is among the metrics."""

    @property
    def needs_reference(self) -> bool:
        """Whether an iteration runs the reference."""
        return self.measure or self.coef > 0

    @model_validator(mode="before")
    @classmethod
    def _one_placement(cls, data: Any) -> Any:
        if isinstance(data, dict) and (data.get("placement") in ("both", ["reward", "loss"], ["loss", "reward"])):
            raise ValueError("placement: in the reward and in the loss, one divergence would be charged twice and `target` "
                             "could steer neither; choose reward or loss")
        return data

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError("estimator=k1 in the loss has a gradient that is 0 on average; take k2, k3 or placement=reward")
        if self.target is not None and self.coef == 0:
            raise ValueError("target adapts coef by factors, and coef=0 stays 0; set coef above 0, or target to null")
        return self


class GAEConfig(Settings):
    """From rewards to advantages: generalized advantage estimation (Schulman et al. 2016), or without a critic."""

    estimator: Literal["gae", "grpo", "rloo", "reinforce++", "reinforce++-baseline"] = "gae"
    """`gae` needs a critic. The others have none; all but `reinforce++` compare the responses to one prompt, k ≥ 2."""
    gamma: float = Field(1.0, gt=0, le=1)
    """γ, discount per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """λ: 0 is one-step TD, 1 is Monte Carlo."""
    critic_lambda: float | None = Field(None, ge=0, le=1)
    """λ of the critic's returns (Yuan et al. 2025, VC-PPO); null is that of the advantages."""
    length_adaptive_alpha: PositiveFloat | None = None
    """α: a response of R tokens has λ = 1 − 1/(αR) in the place of `gae_lambda` (Yue et al. 2025, VAPO: 0.05)."""
    truncation: Literal["terminal", "bootstrap"] = "terminal"
    """What comes after a response cut at the length limit, or an episode at its time limit: nothing, or V there."""
    whiten_rewards: bool = False
    """Whether r_t are divided by their σ over the batch, their mean kept."""
    whiten: Literal["batch", "none"] | None = None
    """Whether advantages get mean 0 and variance 1 over the batch's tokens; null: all but `grpo` and `rloo` do."""
    whiten_unbiased: bool = True
    """Whether the variance of whitening is divided by n − 1 rather than n."""

    @property
    def has_critic(self) -> bool:
        """Whether values are needed."""
        return self.estimator == "gae"

    @property
    def compares_responses(self) -> bool:
        """Whether a response is measured against the others to its prompt."""
        return self.estimator in ("grpo", "rloo", "reinforce++-baseline")

    @property
    def whitens(self) -> bool:
        """`whiten`, or what is conventional for the estimator."""
        return self.whiten == "batch" if self.whiten else self.estimator not in ("grpo", "rloo")

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        for name in ("critic_lambda", "length_adaptive_alpha", "truncation"):
            if getattr(self, name) != type(self).model_fields[name].default and not self.has_critic:
                raise ValueError(f"{name} is about a critic's values, and estimator={self.estimator} has none; leave it out")
        if self.compares_responses and self.whiten_rewards:
            raise ValueError(f"whiten_rewards moves the reward of every token, so that estimator={self.estimator} would "
                             "compare lengths; set it to false")
        if self.compares_responses and self.gamma != 1:
            raise ValueError(f"gamma={self.gamma:g}: estimator={self.estimator} compares whole responses, whose rewards are "
                             "summed without a discount; leave it 1")
        return self


class PPOConfig(Settings):
    """The clipped policy update and the value regression (Schulman et al. 2017)."""

    objective: Literal["ppo", "a2c"] = "ppo"
    """The policy's loss: PPO's clipped −ratio·A, or its predecessor's −log π·A (Mnih et al. 2016), for one epoch."""
    epochs: PositiveInt = 4
    """Passes over the batch."""
    minibatches: PositiveInt = 4
    """Optimizer steps per pass; must divide the responses, or the steps, of a batch."""
    whiten_minibatches: bool = False
    """Whether advantages get mean 0 and variance 1 over each minibatch, in the place of `gae.whiten`."""
    clip_range_low: float = Field(0.2, gt=0, lt=1)
    """ε_low: the ratio is clipped below at 1 − ε_low."""
    clip_range_high: PositiveFloat = 0.2
    """ε_high: the ratio is clipped above at 1 + ε_high."""
    dual_clip: float | None = Field(None, gt=1)
    """c: where A < 0 the loss is at most −c·A (Ye et al. 2020); null for no bound."""
    value_clip_range: PositiveFloat | None = 0.2
    """Values are clipped to ± this around those of the rollout; null for no clipping."""
    value_coef: PositiveFloat = 1.0
    """Weight of the value loss; AdamW being indifferent to it, it matters only to clipping and to AdamW's ε."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    loss_aggregation: Literal["token", "sequence"] = "token"
    """The loss of a minibatch: the mean over its tokens or steps, or the mean over its responses of each one's mean."""
    learning_rate: PositiveFloat = 1e-5
    """The actor's AdamW learning rate, before `schedule`."""
    critic_learning_rate: PositiveFloat | None = 1e-5
    """The critic's AdamW learning rate, before `schedule`; null: the actor's."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How both learning rates fall, an iteration at a time, to 0 after `schedule_iterations`."""
    schedule_iterations: PositiveInt | None = None
    """Length of a schedule that falls."""
    warmup_iterations: int = Field(0, ge=0)
    """Iterations in which both learning rates rise linearly to full."""
    critic_warmup: int = Field(0, ge=0)
    """The first so many iterations train the critic alone, each on rollouts of its own; the actor's weights stay."""
    adam_epsilon: PositiveFloat = 1e-5
    """AdamW's ε."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients of the actor, and those of the critic, are scaled down to this norm; in control tasks both together."""
    target_kl: PositiveFloat | None = None
    """The update ends after the minibatch whose approximate KL from π_old (k3, nats a token) exceeds it."""
    recompute_old_logprobs: bool = False
    """Whether π_old is the actor as the update computes it rather than as the rollout sampled it."""
    importance_cap: PositiveFloat | None = None
    """C: with recomputed π_old, tokens weigh min(π_old/π_rollout, C) (Yao et al. 2025); null: they all weigh 1."""
    ptx_coef: float = Field(0.0, ge=0)
    """Weight of the language-modelling loss on `data.pretraining`, or on the demonstrations where there is none."""
    ptx_batch_size: PositiveInt = 32
    """Texts that are mixed into each optimizer step."""

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        if self.objective == "a2c" and self.epochs > 1:
            raise ValueError(f"objective=a2c has no ratio that says how far the policy is from the one that sampled; "
                             f"epochs={self.epochs} would go on without one; set it to 1")
        if self.importance_cap is not None and not self.recompute_old_logprobs:
            raise ValueError("importance_cap weighs recomputed against sampled logprobs; set recompute_old_logprobs: true")
        if (self.schedule == "constant") != (self.schedule_iterations is None):
            raise ValueError(f"schedule={self.schedule} with schedule_iterations={self.schedule_iterations}: a falling "
                             "schedule needs its length, a constant one has none")
        if self.target_kl is not None and self.epochs * self.minibatches == 1:
            raise ValueError("target_kl is looked at after a step, and epochs=1, minibatches=1 take but one; set it to null")
        if self.schedule_iterations is not None and self.warmup_iterations >= self.schedule_iterations:
            raise ValueError(f"warmup_iterations={self.warmup_iterations} leave nothing of "
                             f"schedule_iterations={self.schedule_iterations}; shorten the one or lengthen the other")
        return self


class ExecutionConfig(Settings):
    """Where and how fast; not part of any identity. Recorded with every artifact, and used again by resume and rerun."""

    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """Where models run; auto: cuda where torch finds one. Of several GPUs, CUDA_VISIBLE_DEVICES chooses the one."""
    threads: PositiveInt | None = None
    """CPU threads of torch; null takes the cores there are, over `ranks`. The last bits of results depend on it."""
    micro_batch_tokens: PositiveInt = 4096
    """The most tokens, padding included, in one forward or backward pass."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Which kernels of attention a language model uses; auto: those that transformers chooses. flash_attention_2 needs a
    GPU, the package flash-attn, and `base_model.precision` bfloat16 or less."""
    gradient_checkpointing: bool = False
    """Whether an update computes each layer once more in the backward pass instead of keeping what it needs of it: less
    memory, and about a third more time; the same bytes."""
    generation_batch_size: PositiveInt = 256
    """The most responses generated side by side."""
    concurrent_stages: PositiveInt = 1
    """Stages of an iteration that do not need each other (`reference`, `reward`, `value`) and run side by side; each takes
    `threads` threads, and its models' memory."""
    shards: PositiveInt = 1
    """Parts that the rows of `rollout`, `reference`, `reward`, `value` and `evaluate` are cut into. Each is an artifact of
    its own, made again alone if it is lost. What is sampled does not depend on it; the last bits of what is computed do."""
    runner: Literal["inline", "processes", "ray", "prefect"] = "inline"
    """What makes the shards: this process, one after the other; `workers` processes of this machine; as many actors of a Ray
    cluster (extra `ray`); or the workers of a Prefect work pool. All but the first work side by side, each with `threads`
    threads and models of its own."""
    workers: PositiveInt = 2
    """How many processes, or actors."""
    ray_address: str | None = None
    """HOST:PORT of a Ray cluster, as `ray start --head` prints it; null: one of this machine, for as long as the command
    takes."""
    work_pool: str = "baton"
    """The work pool of `runner: prefect`."""
    placement: dict[str, str] = Field(default_factory=dict)
    """Stage → the Prefect work pool that makes it, or its shards, instead of this process: {rollout: gpu, ppo: gpu}."""
    worker_timeout: PositiveFloat | None = 3600.0
    """Seconds for which a work pool may have no worker online while a call waits for one, before the run ends; null: for
    ever. Every half minute a line says what it waits for."""
    ranks: PositiveInt = 1
    """Processes that make `ppo`, `sft` and `reward_model` together, on the CPU with `threads` threads each, or on a GPU
    each: the micro-batches of a minibatch are dealt to them, and gradients are summed. Each has the models and their
    optimizers in memory, unless `fsdp`. Numbers are those of one process, but for last bits."""
    fsdp: bool = False
    """Whether the layers' weights, gradients and moments are sharded over the ranks while `ppo` is made (torch's FSDP2)."""
    warm_models: PositiveInt = 5
    """Models kept in memory between stages; 1 on a machine that holds only one (the update itself needs two)."""
    function_patience: PositiveFloat = 30.0
    """Seconds after which a reward function or judge that has not returned is named, and again after as many."""
    function_timeout: PositiveFloat | None = None
    """Seconds after which it is ended, and the stage with it; null waits forever."""
    server_timeout: PositiveFloat = 60.0
    """Seconds that a reward server may take to answer."""
    server_tries: PositiveInt = 4
    """How often a reward server is asked that does not answer, or answers 429, 500, 502, 503 or 504; in between it is waited
    as long as `Retry-After` says, else 2, 10 and 30 seconds."""
    server_batch_size: PositiveInt | None = None
    """The most responses that a reward server is asked about at once; null: all of a batch."""
    server_concurrency: PositiveInt = 1
    """How many such requests are under way side by side."""
    environments: Literal["sync", "async"] = "sync"
    """Control tasks: environments are stepped one after another in this process, or each in a process of its own."""
    environment_timeout: PositiveFloat = 60.0
    """Control tasks: seconds after which a step or reset, of all environments together, is taken for hung."""


class TrackingConfig(Settings):
    """MLflow, a mirror of the store; training never waits for it."""

    enabled: bool = True
    """Whether runs are mirrored to MLflow."""
    uri: Address | None = None
    """MLflow's tracking URI; null is MLFLOW_TRACKING_URI if set, else sqlite beside the store."""
    experiment: str = "baton"
    """MLflow experiment."""
    best: str | None = None
    """Metric by which the best iteration is found, the greatest: that with MLflow's alias `best`, which retention keeps;
    null: evaluate/gold, or evaluate/episode_return of a control task."""
    traces: int = Field(8, ge=0, le=200)
    """Samples of each evaluation, and as many of what that iteration was trained on, that become traces with their rewards;
    one takes about 50 ms, beside the training."""
    system_metrics: bool = True
    """Whether the use of processors, memory, disk, network and GPUs (where nvidia-ml-py is installed) goes there, every ten
    seconds while the run trains."""


class CheckpointsConfig(Settings):
    """Which checkpoints are written; not part of any identity."""

    every: PositiveInt = 1
    """Every so many iterations, and after the last, the weights are written. Between these snapshots the digests of their
    files alone are kept, and whatever needs the weights makes them again: from the snapshot before, by the updates since,
    over the tables that are in the store. It costs the time of up to `every` − 1 updates."""


PARTS = ("optimizer", "critic", "actor")  # of a checkpoint, what is missed least first


class RetentionConfig(Settings):
    """Which checkpoints are kept whole; not part of any identity. Held to after each iteration, and by `baton gc`."""

    keep_last: PositiveInt | None = None
    """Those of the last so many iterations; null keeps all."""
    keep_every: PositiveInt | None = None
    """Beside them that of every so-many-th iteration; null: of none."""
    keep_best: bool = True
    """Beside them that of the best iteration so far, by `tracking.best`, where its weights were written."""
    drop: Literal["optimizer", "critic", "actor"] = "optimizer"
    """What the others lose: optimizer, critic and actor, in this order, up to this one."""

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError("keep_every names what is kept beside the last ones, and keep_last=null keeps all; set it")
        return self


FREE_SECTIONS = ("execution", "tracking", "checkpoints", "retention")  # sections that may differ from call to call


class Overrides(Settings):
    """What holds for one call, whatever the run was made with; what is left out is as the run has it."""

    iterations: PositiveInt | None = None
    """How far to train."""
    execution: ExecutionConfig | None = None
    """Where and how fast."""
    tracking: TrackingConfig | None = None
    """Which MLflow the run is mirrored to."""
    checkpoints: CheckpointsConfig | None = None
    """Which checkpoints are written."""
    retention: RetentionConfig | None = None
    """Which checkpoints are kept whole."""

    def values_set(self) -> dict[str, Any]:
        """The values that were set, nested as in a config. A number of threads that is not named is the run's."""
        there = self.model_dump(mode="json", exclude_unset=True)
        values = {name: value for name, value in there.items() if value is not None}
        if values.get("execution", {}).get("threads", 0) is None:
            del values["execution"]["threads"]
        return values


NO_OVERRIDES = Overrides()


class RunConfig(Settings):
    """What every run has, of a language model or of a control task."""

    kind: ClassVar[Kind]
    """Whose stages its runs have."""

    seed: int = Field(0, ge=0)
    """Every stage's seed derives from (this, iteration, stage)."""
    iterations: PositiveInt = 10
    """PPO iterations; may be raised later to train on."""
    gae: GAEConfig = GAEConfig()
    ppo: PPOConfig = PPOConfig()
    execution: ExecutionConfig = ExecutionConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    retention: RetentionConfig = RetentionConfig()

    @model_validator(mode="after")
    def _readable(self) -> Self:
        spread = f"runner={self.execution.runner}" if self.execution.runner != "inline" else "placement"
        if (spread != "placement" or self.execution.placement) and self.checkpoints.every > 1:
            raise ValueError(f"execution.{spread}: other processes read each iteration's weights from the store, and "
                             f"checkpoints.every={self.checkpoints.every} does not write them; set it to 1")
        if unknown := sorted(set(self.execution.placement) - set(STAGES[self.kind])):
            raise ValueError(f"execution.placement: no stage {', '.join(unknown)}; there are {', '.join(STAGES[self.kind])}")
        return self

    def decides(self) -> dict[str, Any]:
        """The settings that decide what a run's artifacts are: all but its length, speed, tracking and checkpoints."""
        return self.model_dump(mode="json", exclude={"iterations", *FREE_SECTIONS})

    @property
    def functions(self) -> dict[str, str]:
        """Role → source of every function that it names."""
        raise NotImplementedError

    @property
    def models(self) -> dict[str, str]:
        """Role → source of every model that it names."""
        return {}

    @property
    def best_metric(self) -> str:
        """By which the best iteration is found."""
        return self.tracking.best or {"language": "evaluate/gold", "control": "evaluate/episode_return"}[self.kind]

    def evaluation_due(self, iteration: int, last: int) -> bool:
        """Whether that iteration is evaluated; the `last` one always is."""
        every = self.evaluate.every
        return iteration == last or (every > 0 and iteration % every == 0)

    def snapshot_due(self, iteration: int) -> bool:
        """Whether that iteration's weights are written; those of the last one always are."""
        kept = self.retention.keep_every
        return (iteration >= self.iterations or iteration % self.checkpoints.every == 0
                or (kept is not None and iteration % kept == 0))

    @model_validator(mode="after")
    def _agreeing(self) -> Self:
        if self.ppo.schedule_iterations and self.iterations > self.ppo.schedule_iterations:
            raise ValueError(f"iterations={self.iterations} go on after ppo.schedule_iterations="
                             f"{self.ppo.schedule_iterations}, where the learning rate is 0; raise it, or train less")
        if self.ppo.whiten_minibatches and self.gae.whitens:
            raise ValueError("ppo.whiten_minibatches would whiten what gae.whiten has whitened; set gae.whiten: none")
        return self
