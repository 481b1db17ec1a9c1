"""What an environment gives and takes, brought to what policies are for: observations flattened by Gymnasium, pictures kept
as such, actions taken apart, masks beside the observation."""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces, wrappers

from flows.runs.functions import require_allowed
from schemas.control import EnvironmentConfig, Spaces, WrapperConfig
from schemas.errors import ConfigError

CHANNELS = (1, 2, 3, 4)  # of a picture, or frames of one
STATEFUL = {"NormalizeObservation": "policy.normalize_observations: true", "NormalizeReward": "reward.normalize: scale"}
"""Wrappers whose state outlives an episode → the setting that does the same, its state part of the run."""


class MaskedObservation(gymnasium.Wrapper):
    """Puts the info's `action_mask` behind the observation, 1 where an action is allowed."""

    def __init__(self, environment: gymnasium.Env, size: int) -> None:
        super().__init__(environment)
        seen, self.size = environment.observation_space, size
        low, high = (np.concatenate([bound.astype(np.float32), np.full(size, end, np.float32)])
                     for bound, end in ((seen.low, 0), (seen.high, 1)))
        self.observation_space = spaces.Box(low, high, dtype=np.float32)

    def reset(self, **arguments: Any):
        observation, info = self.env.reset(**arguments)
        return self._with_mask(observation, info), info

    def step(self, action: Any):
        observation, reward, terminated, truncated, info = self.env.step(action)
        over = terminated or truncated  # nothing is chosen there
        return self._with_mask(observation, info, over), reward, terminated, truncated, info

    def _with_mask(self, observation: np.ndarray, info: dict[str, Any], over: bool = False) -> np.ndarray:
        given = info.get("action_mask") if isinstance(info, dict) else None
        if given is None and not over:
            raise ValueError("its info holds no action_mask, and environment.action_mask is true; give one in reset and "
                             "step")
        mask = np.ones(self.size) if given is None else np.concatenate([np.ravel(part) for part in (
            given if isinstance(given, (tuple, list)) else [given])]) != 0
        if mask.shape != (self.size,):
            raise ValueError(f"its action_mask has {mask.size} entries, expected {self.size}, one a choice")
        if not over and not mask.any():
            raise ValueError("its action_mask forbids every action; allow one, or end the episode")
        return np.concatenate([np.asarray(observation, np.float32), mask.astype(np.float32)])


def fitted(environment: gymnasium.Env, config: EnvironmentConfig) -> tuple[gymnasium.Env, Spaces]:
    """The environment in its wrappers, and what a policy has to know of it.

    Raises `ConfigError` on spaces that no policy here is for.
    """
    for wrapper in config.wrappers:
        environment = _wrapped(environment, wrapper)
    environment, actions = _with_plain_actions(environment, config)
    seen = environment.observation_space
    image = _image(seen)
    if not _is_vector(seen):
        if not seen.is_np_flattenable:
            raise ConfigError(f"environment {config.id!r}: its observations are {seen}, which have no fixed size: pad "
                              "them to one in a gymnasium.ObservationWrapper (environment.wrappers)")
        environment = wrappers.FlattenObservation(environment)
    if config.action_mask:
        if actions["kind"] != "discrete" or len(actions["choices"]) != 1:
            raise ConfigError(f"environment {config.id!r}: environment.action_mask is about one Discrete action; its "
                              f"actions are {environment.action_space}")
        environment = MaskedObservation(environment, sum(actions["choices"]))
    size = environment.observation_space.shape[0]
    return environment, Spaces(observation_size=size, image=image, masked=config.action_mask, **actions)


def _wrapped(environment: gymnasium.Env, wrapper: WrapperConfig) -> gymnasium.Env:
    """In a wrapper of Gymnasium's, or of a module."""
    where = f"environment.wrappers {wrapper.name!r}"
    if (setting := STATEFUL.get(wrapper.name.rpartition(":")[2])) is not None:
        raise ConfigError(f"{where}: what it has seen in earlier episodes is not kept, so that a run that goes on would see "
                          f"others; {setting} does that")
    if ":" in wrapper.name:
        require_allowed(wrapper.name)
    module, _, name = wrapper.name.rpartition(":")
    try:
        kind = getattr(importlib.import_module(module or "gymnasium.wrappers"), name)
        return kind(environment, **wrapper.kwargs)
    except AttributeError:
        raise ConfigError(f"{where}: {module or 'gymnasium.wrappers'} has no {name!r}; of another module it is "
                          "module:Name") from None
    except Exception as error:  # whatever a wrapper does with what it is given
        raise ConfigError(f"{where} with kwargs {wrapper.kwargs}: it raised {type(error).__name__}: "
                          f"{' '.join(str(error).split())}") from None


# --- observations ---

def _is_vector(seen: spaces.Space) -> bool:
    return isinstance(seen, spaces.Box) and len(seen.shape) == 1 and seen.shape[0] > 0


def _image(seen: spaces.Space) -> tuple[int, ...]:
    """Height, width and channels of a picture, and 1 where its channels come first, else 0; () where it is none."""
    if not isinstance(seen, spaces.Box) or seen.dtype != np.uint8:
        return ()
    if len(seen.shape) == 2:
        return (*seen.shape, 1, 0)
    if len(seen.shape) != 3:
        return ()
    first = seen.shape[0] in CHANNELS and seen.shape[2] not in CHANNELS
    height, width, channels = (seen.shape[1], seen.shape[2], seen.shape[0]) if first else seen.shape
    return (height, width, channels, int(first))


# --- actions ---

def _with_plain_actions(environment: gymnasium.Env, config: EnvironmentConfig) -> tuple[gymnasium.Env, dict[str, Any]]:
    """With actions that are numbers, or choices; and what they are."""
    actions = environment.action_space
    if isinstance(actions, (spaces.Tuple, spaces.Dict)):
        environment = _taken_apart(environment, config.id)
    elif isinstance(actions, (spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary)) and len(actions.shape) != 1:
        environment = _reshaped(environment)
    if config.scale_actions:
        environment = _scaled(environment, config.id)
    actions = environment.action_space
    match actions:
        case spaces.Box() if actions.shape[0] and np.issubdtype(actions.dtype, np.floating):
            low, high = ([float(x) if np.isfinite(x) else None for x in bound] for bound in (actions.low, actions.high))
            return environment, dict(kind="box", low=low, high=high, dtype=actions.dtype.name)
        case spaces.Discrete():
            return environment, dict(kind="discrete", choices=[int(actions.n)], start=[int(actions.start)], scalar=True)
        case spaces.MultiDiscrete():
            return environment, dict(kind="discrete", choices=actions.nvec.tolist(), start=actions.start.tolist())
        case spaces.MultiBinary():
            count = actions.shape[0]
            return environment, dict(kind="discrete", choices=[2] * count, start=[0] * count)
    raise ConfigError(f"environment {config.id!r}: its actions are {actions}, expected numbers of floating point, choices, "
                      f"or a Tuple or Dict of either; {_way_on(actions)}, in environment.wrappers or a file.py:function")


def _way_on(actions: spaces.Space) -> str:
    if isinstance(actions, spaces.Box):
        return ("gymnasium.wrappers.TransformAction(env, lambda a: (a + low).astype(dtype), a MultiDiscrete of "
                "high - low + 1) counts them from 0")
    return "gymnasium.wrappers.TransformAction builds such an action from numbers or choices"


def _taken_apart(environment: gymnasium.Env, name: str) -> gymnasium.Env:
    """A Tuple or Dict of choices as MultiDiscrete, of numbers as a Box."""
    whole = environment.action_space
    parts = list(whole.spaces.values() if isinstance(whole, spaces.Dict) else whole.spaces)
    if all(isinstance(part, spaces.Box) and np.issubdtype(part.dtype, np.floating) for part in parts):
        return wrappers.TransformAction(environment, lambda a: spaces.unflatten(whole, a), spaces.flatten_space(whole))
    kinds = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    if not all(isinstance(part, kinds) for part in parts):
        raise ConfigError(f"environment {name!r}: its actions are {whole}, expected a Tuple or Dict of numbers alone, or of "
                          "choices alone; gymnasium.wrappers.TransformAction builds others, in environment.wrappers or a "
                          "file.py:function")
    counts = [np.atleast_1d(part.n if isinstance(part, spaces.Discrete) else np.full(part.shape, 2) if isinstance(
        part, spaces.MultiBinary) else part.nvec).ravel() for part in parts]
    starts = [np.atleast_1d(getattr(part, "start", 0)).ravel() if not isinstance(part, spaces.MultiBinary)
              else np.zeros(len(count), np.int64) for part, count in zip(parts, counts, strict=True)]

    def together(action: np.ndarray) -> Any:
        pieces = np.split(np.asarray(action), np.cumsum([len(count) for count in counts])[:-1])
        built = [part.dtype.type(piece[0]) if isinstance(part, spaces.Discrete)
                 else piece.astype(part.dtype).reshape(part.shape) for part, piece in zip(parts, pieces, strict=True)]
        return dict(zip(whole.spaces, built, strict=True)) if isinstance(whole, spaces.Dict) else tuple(built)

    choices = spaces.MultiDiscrete(np.concatenate(counts), start=np.concatenate(starts))
    return wrappers.TransformAction(environment, together, choices)


def _reshaped(environment: gymnasium.Env) -> gymnasium.Env:
    """Actions of several dimensions as of one."""
    actions, shape = environment.action_space, environment.action_space.shape
    match actions:
        case spaces.Box():
            plain: spaces.Space = spaces.Box(actions.low.ravel(), actions.high.ravel(), dtype=actions.dtype)
        case spaces.MultiDiscrete():
            plain = spaces.MultiDiscrete(actions.nvec.ravel(), start=np.ravel(actions.start))
        case _:
            plain = spaces.MultiBinary(int(np.prod(shape)))
    return wrappers.TransformAction(environment, lambda a: np.asarray(a).reshape(shape), plain)


def _scaled(environment: gymnasium.Env, name: str) -> gymnasium.Env:
    """A bounded Box as one from −1 to 1."""
    actions = environment.action_space
    if not isinstance(actions, spaces.Box) or not (np.isfinite(actions.low).all() and np.isfinite(actions.high).all()):
        raise ConfigError(f"environment {name!r}: environment.scale_actions is about a Box with bounds, and its actions are "
                          f"{actions}; set it to false")
    one = actions.dtype.type(1)
    return wrappers.RescaleAction(environment, -one, one)
