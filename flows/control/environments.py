"""Gymnasium environments: made from a config, checked, side by side in a vector, and watched while they are stepped."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial

import cloudpickle
import gymnasium
import numpy as np
from gymnasium.error import DependencyNotInstalled, Error, NameNotFound, NamespaceNotFound
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from flows.control.spaces import fitted
from flows.runs.functions import require_allowed
from schemas.control import EnvironmentConfig, Spaces
from schemas.errors import ConfigError, EnvironmentFailure, installed_by
from schemas.settings import ExecutionConfig
from stages.ops.episodes import Player
from stages.ops.guest import HungError, ring
from stages.ops.user_errors import said

gymnasium.logger.min_level = gymnasium.logger.ERROR + 1  # what it would say on stderr, errors here say in one line
EXTRAS = {"mujoco": "mujoco", "box2d": "box2d", "pygame": "classic-control"}  # module that is missing → Baton's extra


def make_environment(
    config: EnvironmentConfig, function: Callable[..., gymnasium.Env] | None = None, **more: object
) -> gymnasium.Env:
    """One environment, by the user's function or by its id. Raises `ConfigError` saying what is missing."""
    if function is None and ":" in config.id:  # Gymnasium imports the module, which runs it
        require_allowed(config.id)
    try:
        if function is not None:
            environment = function(**{**config.kwargs, **more})
            if not isinstance(environment, gymnasium.Env):
                raise TypeError(f"the function gave {type(environment).__name__}, expected a gymnasium.Env")
            return environment
        return gymnasium.make(config.id, **{**config.kwargs, **more})
    except DependencyNotInstalled as error:
        raise ConfigError(f"environment.id {config.id!r}: {_line(error)} ({_extra(error)})") from None
    except (NameNotFound, NamespaceNotFound) as error:
        raise ConfigError(f"environment.id {config.id!r}: {_line(error)}; if another package has it, install that and "
                          "write module:Id-v0") from None
    except Error as error:
        raise ConfigError(f"environment.id {config.id!r}: {_line(error)}") from None
    except (Exception, SystemExit) as error:  # whatever a user's environment does when it is made
        raise ConfigError(f"environment {config.id!r} with kwargs {config.kwargs}: it {said(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _extra(error: Exception) -> str:
    """How to install what is missing."""
    for module, extra in EXTRAS.items():
        if module in str(error).lower():
            return installed_by(extra)
    return "install what it names"


def look_at(config: EnvironmentConfig, function: Callable[..., gymnasium.Env] | None, seconds: float) -> Spaces:
    """What an environment of that config gives and takes. Raises `ConfigError`, and `EnvironmentFailure` if it hangs."""
    with Watch(config.id, seconds)("making one"):
        environment = make_environment(config, function)
    try:
        return fitted(environment, config)[1]
    finally:
        with contextlib.suppress(Exception):  # harmless: it was never reset
            environment.close()


def make_vector(
    config: EnvironmentConfig, function: Callable[..., gymnasium.Env] | None, count: int, execution: ExecutionConfig
) -> VectorEnv:
    """`count` environments without autoreset."""
    if execution.environments == "sync":
        return SyncVectorEnv([partial(_player, config, function, i) for i in range(count)], copy=False,
                             autoreset_mode=AutoresetMode.DISABLED)
    if function is not None:  # a file's, which no other process could import
        cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    try:
        return AsyncVectorEnv([partial(_in_a_process, config, function, i, os.getpid()) for i in range(count)],
                              autoreset_mode=AutoresetMode.DISABLED)
    except (EOFError, ConnectionError) as error:
        raise EnvironmentFailure(f"{config.id}: the process of an environment ended while it was made; nothing was "
                                 "committed") from error


def _player(config: EnvironmentConfig, function: Callable[..., gymnasium.Env] | None, index: int) -> Player:
    unchecked = {} if function else {"disable_env_checker": True}  # Gymnasium's check of first calls; ours is of all
    return Player(fitted(make_environment(config, function, **unchecked), config)[0], config.id, index)


def _in_a_process(
    config: EnvironmentConfig, function: Callable[..., gymnasium.Env] | None, index: int, parent: int
) -> Player:
    if os.getpid() != parent:  # it would inherit Prefect's answer to SIGTERM
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.stdout = sys.stderr  # what an environment prints is no part of a command's JSON
    return _player(config, function, index)


class Watch:
    """Ends a call that does not come back in `seconds`, as `EnvironmentFailure`: `with watch("step"): …`.

    By an alarm signal, and so in the main thread only; elsewhere, and on systems without the signal, there is no timeout.
    The signal's handler stays, since to set it for every step would cost as much as a small step.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self._watching = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        if self._watching:
            signal.signal(signal.SIGALRM, ring)

    def __call__(self, what: str, steps: np.ndarray | None = None) -> Watch:
        """`steps`: of the episodes that the call is about."""
        self.what, self.steps = what, steps
        return self

    def __enter__(self) -> Watch:
        if self._watching:
            signal.setitimer(signal.ITIMER_REAL, self.seconds, self.seconds)  # again, in case the first is caught
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._watching:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
            except HungError as late:  # it rang on the way here
                signal.setitimer(signal.ITIMER_REAL, 0)
                error = late
        if isinstance(error, HungError):
            where = "" if self.steps is None else f", at the steps {self.steps.tolist()} of their episodes"
            raise EnvironmentFailure(f"{self.name}: {self.what} has not come back for {self.seconds:g} s{where}; nothing "
                                     "was committed (execution.environment_timeout sets the limit)") from None
