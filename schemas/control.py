"""The settings of a control task's run: Gymnasium environments, small policies, and the contradictions between them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from schemas.presets import CONTROL, merged
from schemas.settings import GAEConfig, Later, PPOConfig, RunConfig, Settings
from schemas.stages import Kind

ESTIMATORS = get_args(GAEConfig.model_fields["estimator"].annotation)  # `gae` first


class WrapperConfig(Settings):
    """One wrapper around an environment."""

    name: str
    """Of `gymnasium.wrappers`, such as TimeLimit; or `module:Name` of an installed module."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """What it is given beside the environment."""


class EnvironmentConfig(Settings):
    """What the policy acts in."""

    id: str
    """Gymnasium's id, `module:Id-v0` of an installed module, or `file.py:function` beside the config, which makes one."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """What `gymnasium.make`, or the function, is given besides."""
    wrappers: Annotated[tuple[WrapperConfig, ...], Later(before=())] = ()
    """What it is wrapped in, the innermost first; a wrapper may keep nothing from one episode to the next."""
    scale_actions: Annotated[bool, Later(before=False)] = False
    """Whether a policy's −1 to 1 is a bounded Box's low to high; else the environment is given what is sampled, clipped."""
    action_mask: Annotated[bool, Later(before=False)] = False
    """Whether actions that the info's `action_mask` forbids have no part in the distribution, in rollout and update
    alike."""


class PolicyConfig(Settings):
    """Actor and critic: two separate networks of fully connected layers."""

    hidden: tuple[PositiveInt, ...] = (64, 64)
    """Sizes of the actor's hidden layers."""
    critic_hidden: tuple[PositiveInt, ...] | None = None
    """Sizes of the critic's; null: as the actor's."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Between layers."""
    log_std_init: float = 0.0
    """Box actions: log σ of the Gaussian before any training."""
    state_dependent_std: bool = False
    """Box actions: whether log σ is an output of the network, rather than a parameter of its own for each action."""
    normalize_observations: bool = False
    """Whether observations are (o − μ)/σ by running moments, which are part of both networks' checkpoints."""
    clip_observations: PositiveFloat = 10.0
    """Normalised observations are clipped to ± this."""
    channels: Annotated[tuple[PositiveInt, ...], Later(before=(16, 32))] = (16, 32)
    """Pictures: channels of the convolutions before the other layers, 3 × 3 with stride 2."""


class ControlRolloutConfig(Settings):
    """One on-policy batch: num_envs · num_steps steps."""

    num_envs: PositiveInt = 1
    """N, environments stepped side by side."""
    num_steps: PositiveInt = 2048
    """Steps of each in an iteration; an episode may go on in the next."""


class ControlRewardConfig(Settings):
    """What becomes of the environment's rewards before PPO sees them: scaled → clipped."""

    normalize: Literal["none", "scale"] = "none"
    """`scale`: divided by σ of all discounted returns so far, this batch's included."""
    clip: PositiveFloat | None = None
    """Rewards are clipped to ± this; null leaves them."""


class ControlEvaluateConfig(Settings):
    """Episodes with the policy's most likely actions, in environments of their own; moments of observations are frozen."""

    every: int = Field(0, ge=0)
    """Evaluate every so many iterations, and always at the start and after the last; 0: only then."""
    episodes: PositiveInt = 10
    """Episodes, each with a seed of its own, the same ones in every evaluation."""
    max_steps: PositiveInt = 10_000
    """An episode that has not ended by then is cut."""
    picture: bool = True
    """Whether the first of them is kept as an animated picture, where the environment renders."""


class Spaces(Settings):
    """What an environment gives and takes; kept with every policy."""

    observation_size: PositiveInt
    """D, numbers of an observation."""
    kind: Literal["box", "discrete"]
    """Whether an action is numbers, or choices."""
    low: tuple[float | None, ...] = ()
    """Box: lower bound of each of A numbers; null where there is none."""
    high: tuple[float | None, ...] = ()
    """Box: upper bounds."""
    dtype: str = "float32"
    """Box: NumPy's name of the numbers' type."""
    choices: tuple[PositiveInt, ...] = ()
    """Discrete: how many there are to choose from, for each of A choices."""
    start: tuple[int, ...] = ()
    """Discrete: what the environment calls the first of each."""
    scalar: bool = False
    """Discrete: whether an action is one number rather than a list of one (Discrete rather than MultiDiscrete)."""
    image: Annotated[tuple[int, ...], Later(before=())] = ()
    """A picture: height, width, channels, and 1 where the channels come first in the observation; () for anything else."""
    masked: Annotated[bool, Later(before=False)] = False
    """Discrete: whether the last numbers of an observation are the mask of actions, 1 where one is allowed."""

    @property
    def action_size(self) -> int:
        """A."""
        return len(self.low) or len(self.choices)

    @property
    def seen_size(self) -> int:
        """Numbers of an observation without the mask."""
        return self.observation_size - (sum(self.choices) if self.masked else 0)


class ControlConfig(RunConfig):
    """A whole training run of a control task. `gae` and `ppo` start from `schemas/presets.py`'s CONTROL."""

    kind: ClassVar[Kind] = "control"
    environment: EnvironmentConfig
    gae: GAEConfig = GAEConfig.model_validate(CONTROL["gae"])
    ppo: PPOConfig = PPOConfig.model_validate(CONTROL["ppo"])
    policy: PolicyConfig = PolicyConfig()
    rollout: ControlRolloutConfig = ControlRolloutConfig()
    reward: ControlRewardConfig = ControlRewardConfig()
    evaluate: ControlEvaluateConfig = ControlEvaluateConfig()

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, data: Any) -> Any:
        """`CONTROL` below what is written."""
        if not isinstance(data, dict):
            return data
        if isinstance(gae := data.get("gae"), dict) and gae.get("estimator") in ESTIMATORS[1:]:
            raise ValueError(f"gae.estimator={gae['estimator']} compares or sums whole responses; a control task needs gae")
        return merged(CONTROL, data)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for problem in _inconsistencies(self):
            raise ValueError(problem)
        return self

    @property
    def functions(self) -> dict[str, str]:
        source = self.environment.id
        return {"environment": source} if source.rpartition(":")[0].endswith(".py") else {}

    @property
    def batch_size(self) -> int:
        """Steps of an iteration."""
        return self.rollout.num_envs * self.rollout.num_steps


def _inconsistencies(c: ControlConfig):
    """One line for each contradiction between sections."""
    steps = f"rollout.num_envs={c.rollout.num_envs} times rollout.num_steps={c.rollout.num_steps}"
    if c.execution.shards > 1:
        yield (f"execution.shards={c.execution.shards}: a control task steps its environments together; set it to 1, "
               "execution.environments=async steps each in a process of its own")
    if c.execution.ranks > 1:
        yield (f"execution.ranks={c.execution.ranks}: the networks of a control task are too small for it to pay; set it to "
               "1")
    if c.execution.fsdp:
        yield "execution.fsdp: the networks of a control task are too small for it to pay; set it to false"
    if c.batch_size % c.ppo.minibatches:
        yield f"{steps}: {c.batch_size} steps do not divide into ppo.minibatches={c.ppo.minibatches}; make it a multiple"
    if c.ppo.whiten_minibatches and c.batch_size == c.ppo.minibatches:
        yield (f"{steps} with ppo.minibatches={c.ppo.minibatches}: whitening a minibatch of one step removes the "
               "learning signal; make minibatches larger, or set ppo.whiten_minibatches: false")
    if c.gae.whitens and c.batch_size == 1:
        yield f"{steps}: whitening one step removes the learning signal; take more steps, or set gae.whiten: none"
    if c.gae.length_adaptive_alpha is not None:
        yield "gae.length_adaptive_alpha is about the length of responses; a batch cuts episodes anywhere; set it to null"
    if c.ppo.loss_aggregation != "token":
        yield "ppo.loss_aggregation=sequence is about responses; a control task's minibatches are of steps; leave it token"
    if c.ppo.ptx_coef:
        yield "ppo.ptx_coef mixes in texts, and a control task has none; set it to 0"
