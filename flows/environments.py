"""Gymnasium environments: made from a config, checked, side by side in a vector, and watched while they are stepped."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from functools import partial

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled, Error
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from schemas.control import EnvironmentConfig, Spaces
from schemas.errors import ConfigError, EnvironmentFailure
from schemas.settings import ExecutionConfig
from stages.ops.environments import Named

EXTRAS = {"mujoco": "mujoco", "pygame": "classic-control"}  # module that is missing → extra of Baton's that brings it


def make_environment(
    config: EnvironmentConfig, function: Callable[..., gymnasium.Env] | None = None, **more: object
) -> gymnasium.Env:
    """One environment, by the user's function or by its id. Raises `ConfigError` saying what is missing."""
    try:
        if function is not None:
            environment = function(**config.kwargs, **more)
            if not isinstance(environment, gymnasium.Env):
                raise TypeError(f"the function gave {type(environment).__name__}, expected a gymnasium.Env")
            return environment
        return gymnasium.make(config.id, **config.kwargs, **more)
    except DependencyNotInstalled as error:
        raise ConfigError(f"environment.id {config.id!r}: {_line(error)} ({_extra(error)})") from None
    except Error as error:
        raise ConfigError(f"environment.id {config.id!r}: {_line(error)}; if another package has it, install that and "
                          "write module:Id-v0") from None
    except Exception as error:  # whatever a user's environment does when it is made
        raise ConfigError(f"environment {config.id!r} with kwargs {config.kwargs}: {type(error).__name__}: {_line(error)}"
                          ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _extra(error: Exception) -> str:
    """How to install what is missing."""
    for module, extra in EXTRAS.items():
        if module in str(error).lower():
            return f"pip install 'baton[{extra}]'"
    return "install what it names"


def spaces_of(environment: gymnasium.Env, name: str) -> Spaces:
    """What a policy has to know of it. Raises `ConfigError` on spaces that no policy here is for."""
    seen, actions = environment.observation_space, environment.action_space
    if not isinstance(seen, spaces.Box) or len(seen.shape) != 1 or not seen.shape[0]:
        raise ConfigError(f"environment {name!r}: its observations are {seen}, expected a Box of one dimension; wrap it in "
                          "gymnasium.wrappers.FlattenObservation in a file.py:function")
    size = {"observation_size": seen.shape[0]}
    match actions:
        case spaces.Box() if len(actions.shape) == 1 and actions.shape[0] and np.issubdtype(actions.dtype, np.floating):
            low, high = ([float(x) if np.isfinite(x) else None for x in bound] for bound in (actions.low, actions.high))
            return Spaces(kind="box", low=low, high=high, **size)
        case spaces.Discrete():
            return Spaces(kind="discrete", choices=[int(actions.n)], start=[int(actions.start)], scalar=True, **size)
        case spaces.MultiDiscrete() if actions.nvec.ndim == 1:
            return Spaces(kind="discrete", choices=actions.nvec.tolist(), start=actions.start.tolist(), **size)
    raise ConfigError(f"environment {name!r}: its actions are {actions}, expected a Box of one dimension, Discrete or "
                      "MultiDiscrete; wrap it in a file.py:function that gives one of these")


def make_vector(
    config: EnvironmentConfig, function: Callable[..., gymnasium.Env] | None, count: int, execution: ExecutionConfig
) -> VectorEnv:
    """`count` environments that are reset only when they are told to."""
    makers = [partial(_named, config, function, i) for i in range(count)]
    if execution.environments == "async":
        return AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)
    return SyncVectorEnv(makers, copy=False, autoreset_mode=AutoresetMode.DISABLED)


def _named(config: EnvironmentConfig, function: Callable[..., gymnasium.Env] | None, index: int) -> Named:
    unchecked = {} if function else {"disable_env_checker": True}  # Gymnasium's check of first calls; ours is of all
    return Named(make_environment(config, function, **unchecked), config.id, index)


class _HungError(BaseException):
    """Not an `Exception`, so that an environment does not catch it."""


class Watch:
    """Ends a call of an environment that does not come back in `seconds`, a tenth more or less, as `EnvironmentFailure`.

    By an alarm signal, and so in the main thread only; elsewhere, and on systems without the signal, nobody watches.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds, self.what, self.calls = name, seconds, "", 0

    def __call__(self, what: str, calls: int = 1) -> None:
        """A call begins, `reset` or `step`, that may take `calls` times as long: a reset may play an episode again."""
        self.what, self.calls = what, self.calls + (what == "step")
        now = time.monotonic()
        if self._watching and (calls > 1 or now > self._armed + self.seconds / 10):  # not before every call: it costs
            signal.setitimer(signal.ITIMER_REAL, self.seconds * calls)
            self._armed = now if calls == 1 else float("-inf")

    def __enter__(self) -> Watch:
        self.calls, self._armed = 0, float("-inf")
        self._watching = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        if self._watching:
            self._before = signal.signal(signal.SIGALRM, self._ring)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._watching:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)
        self._watching = False
        if isinstance(error, _HungError):
            raise EnvironmentFailure(
                f"{self.name}: {self.what} has not come back for {self.seconds:g} s, after {self.calls} steps of this "
                "batch; nothing was committed (execution.environment_timeout sets the limit)") from None

    _watching = False

    def _ring(self, *_: object) -> None:
        raise _HungError
