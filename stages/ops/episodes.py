"""Gymnasium environments side by side, the episodes they are in, and how an episode is taken up again.

The k-th episode of environment i is reset with a seed that derives from (run seed, i, k) alone. An environment is
therefore a function of that seed and the actions since, and is not itself state that has to be kept: after a break the
open episodes are played again with the actions that the trajectories hold. Autoreset is off, so that no transition leads
from the end of one episode to the beginning of the next.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv

from schemas.control import Spaces
from schemas.errors import EnvironmentFailure
from schemas.tables import Trajectories
from stages.ops.networks import ToEnvironment
from stages.ops.user_errors import said

log = logging.getLogger("baton")


def episode_seed(seed: int, environment: int, episode: int) -> int:
    """31 bits from (run's seed of environments, which environment, which episode)."""
    return int(np.random.SeedSequence([seed, environment, episode]).generate_state(1)[0] >> 1)


class Player(gymnasium.Wrapper):
    """An environment whose errors name episode and step, that can replay a step of an episode, and can rest.

    Raises `EnvironmentFailure` naming the environment, the episode's seed and the step.
    """

    def __init__(self, environment: gymnasium.Env, name: str, index: int) -> None:
        super().__init__(environment)
        self.name, self.index, self.seed, self.steps, self.over = name, index, None, 0, False
        self.resting, self.shown = False, None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """With `options["replay"]` no reset, but a step with this environment's action of that list, unless the episode is
        `over`, as the info says; with `options["rest"]` none either, and steps from then on do nothing."""
        if options and "replay" in options:
            if not self.over:
                self.step(options["replay"][self.index])
            return self.shown, {"over": self.over}
        if options and "rest" in options:
            self.resting = True
            return self.shown, {}
        self.seed, self.steps, self.over, self.resting = seed, 0, False, False
        try:
            observation, info = _parts(self.env.reset(seed=seed), 2, "reset")
            self.shown = self._checked(observation)
        except (Exception, SystemExit) as error:  # whatever a user's environment does
            raise self._failure(error) from error
        return self.shown, _noted(info)

    def step(self, action):
        if self.resting:
            return self.shown, 0.0, False, False, {}
        self.steps += 1
        try:
            observation, reward, terminated, truncated, info = _parts(self.env.step(action), 5, "step")
            self.shown, reward = self._checked(observation), _number(reward)
            terminated, truncated = bool(terminated), bool(truncated)
        except (Exception, SystemExit) as error:  # whatever a user's environment does
            raise self._failure(error) from error
        self.over = terminated or truncated
        return self.shown, reward, terminated, truncated, _noted(info) if self.steps == 1 else {}

    def _checked(self, observation: Any) -> np.ndarray:
        """As the space declares it. Raises `_UnusableError` or whatever NumPy cannot make of it."""
        declared = np.asarray(observation, self.observation_space.dtype)
        if declared.shape != (shape := self.observation_space.shape):
            raise _UnusableError(f"gave an observation of shape {declared.shape}, expected {shape}")
        given = np.asarray(observation)
        if declared.dtype.kind in "iub" and (given != declared).any():
            raise _UnusableError(f"gave the observation {given.tolist()}, and its space of {declared.dtype} would make "
                                 f"{declared.tolist()} of it; declare a space that holds it, such as a Box of float32")
        return declared

    def _failure(self, error: BaseException) -> EnvironmentFailure:
        text = " ".join(str(error).split())
        what = text if isinstance(error, _UnusableError) else said(error)
        return failure(self.name, self.index, self.seed, self.steps, what)


class _UnusableError(Exception):
    """What an environment gave, in words."""


def _parts(given: Any, count: int, what: str) -> tuple:
    """What Gymnasium's `reset` or `step` gives. Raises `_UnusableError` where it is not that."""
    if isinstance(given, tuple) and len(given) == count:
        return given
    found = f"{len(given)} values" if isinstance(given, tuple) else type(given).__name__
    expected = "(observation, info)" if what == "reset" else "(observation, reward, terminated, truncated, info)"
    raise _UnusableError(f"gave {found} from {what}, expected {expected}: this is the old API of Gym; shimmy's "
                         "GymV21CompatibilityV0(env=…), in a file.py:function, wraps it")


def _noted(info: Any) -> dict[str, bool]:
    """Of an info, what is said of it."""
    return {"masked": True} if isinstance(info, dict) and "action_mask" in info else {}


def _number(reward: Any) -> float:
    """A reward, also as an array of one. Raises `_UnusableError`."""
    try:
        value = np.asarray(reward, np.float64)
    except (TypeError, ValueError):
        raise _UnusableError(f"gave the reward {reward!r:.60}, expected a number") from None
    if value.size != 1:
        raise _UnusableError(f"gave a reward of shape {value.shape}, expected a number")
    return value.item()


def failure(name: str, index: int, seed: int | None, step: int, what: str) -> EnvironmentFailure:
    """`step`: of the episode, 0 for its reset."""
    where = f"step {step}" if step else "reset"
    return EnvironmentFailure(f"{name}, environment {index}: {where} of the episode with seed {seed} {what}; nothing was "
                              "committed")


class Watch(Protocol):
    """Ends what takes too long: `with watch("step", steps):` raises `EnvironmentFailure` naming it and those steps."""

    def __call__(self, what: str, steps: np.ndarray) -> AbstractContextManager[object]:
        """`steps`: (N,) of the episodes, none for what is no environment's call."""


class Environments:
    """N environments, what each shows now, and how far each is in its episode. A context that closes them at its end."""

    def __init__(
        self, vector: VectorEnv, spaces: Spaces, name: str, *, seed: int, once: bool = False,
        watch: Watch = lambda what, steps: nullcontext(),
    ) -> None:
        """`seed`: what episodes' seeds derive from; `once`: whether each plays one episode and then rests."""
        self.vector, self.spaces, self.name, self.seed, self.once, self.watch = vector, spaces, name, seed, once, watch
        self.to_environment, self._told = ToEnvironment(spaces), False
        self.observations = np.zeros((len(self), spaces.observation_size), np.float32)
        self.episode, self.start, self.steps = (np.zeros(len(self), np.int64) for _ in range(3))
        self.episode_return, self.discounted_return = (np.zeros(len(self)) for _ in range(2))

    def __len__(self) -> int:
        return self.vector.num_envs

    def __enter__(self) -> Environments:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(force=error is not None)

    def begin(self) -> None:
        """Resets all, each to the episode it is at."""
        self._reset(np.ones(len(self), bool))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(N, A) sampled actions to (N, D) observations, (N,) rewards, terminated, truncated.

        Finished episodes are followed by new ones: `observations` then shows their first. Raises `EnvironmentFailure`.
        """
        taken = self.to_environment(actions)
        with self._call("step"):
            observations, rewards, terminated, truncated, info = self.vector.step(taken)
        self._say(info)
        self.steps += 1
        self._see(observations, rewards)
        reached = self.observations.copy()
        if (ended := terminated | truncated).any():
            if self.once:
                with self._call("step"):
                    self.vector.reset(seed=[None] * len(self), options={"reset_mask": ended, "rest": True})
            else:
                self.episode = self.episode + ended
                self._reset(ended)
        return reached, rewards, terminated, truncated

    def seeds(self, which: np.ndarray | None = None) -> list[int | None]:
        """Of the episodes they are in; None for those that are not in `which`, (N,) bool."""
        return [episode_seed(self.seed, i, int(k)) if which is None or which[i] else None
                for i, k in enumerate(self.episode)]

    def keep(self, batch: Trajectories) -> None:
        """Remembers where `batch` has left the episodes: which, how many steps, what returns."""
        rows = last_rows(batch)
        open_, lengths = ~batch.ended[rows], batch.logprobs.lengths[rows]
        self.episode = batch.episode[rows] + ~open_
        self.start = (batch.start[rows] + lengths) * open_
        self.episode_return = batch.episode_return[rows] * open_
        self.discounted_return = batch.discounted_returns.values[batch.discounted_returns.offsets[rows + 1] - 1] * open_

    def resume(self, batch: Trajectories, replay: Sequence[np.ndarray]) -> list[int]:
        """Takes up the episodes that `batch` has left open, by playing them again; `replay`: see `actions_since_reset`.

        Which environments did not come to the observation they had come to, or to an end: they are not deterministic, and
        begin a new episode.
        """
        self.keep(batch)
        self.begin()
        lengths = np.array([len(actions) for actions in replay])
        taken = [self.to_environment(actions) for actions in replay]
        over = np.zeros(len(self), bool)
        for t in range(lengths.max(initial=0)):
            which = lengths > t
            over |= self._replay(which, [actions[t] if left else None for actions, left in zip(taken, which, strict=True)])
        strayed = (self.start > 0) & (over | (self.observations != batch.final_observation[last_rows(batch)]).any(1))
        if strayed.any():
            self.episode = self.episode + strayed
            for carried in (self.start, self.episode_return, self.discounted_return):
                carried[strayed] = 0
            self._reset(strayed)
        return np.flatnonzero(strayed).tolist()

    def close(self, *, force: bool = False) -> None:
        """Closes them, errors ignored. Processes that are left are killed, and with `force` all of them at once."""
        processes = getattr(self.vector, "processes", ())
        if not (force and processes):
            with suppress(Exception), self.watch("close", self.steps):
                self.vector.close()
        for process in processes:
            process.kill()
            process.join()
        self.vector.closed = True

    def _reset(self, which: np.ndarray) -> None:
        self.steps[which] = 0
        with self._call("reset"):
            observations, info = self.vector.reset(seed=self.seeds(which), options={"reset_mask": which})
        self._say(info)
        self._see(observations, np.zeros(len(self)))

    def _say(self, info: dict[str, Any]) -> None:
        if "masked" in info and not self._told and not self.spaces.masked:
            self._told = True
            log.warning("%s: its info holds an action_mask, which is not used: actions that it forbids are sampled too; "
                        "environment.action_mask: true uses it", self.name)

    def _replay(self, which: np.ndarray, actions: list[Any]) -> np.ndarray:
        """A step of those in `which`. (N,) bool: whose episodes are over by then."""
        with self._call("step"):
            observations, info = self.vector.reset(seed=[None] * len(self), options={"reset_mask": which, "replay": actions})
        self.steps += which
        self._see(observations, np.zeros(len(self)))
        return info["over"]

    def _see(self, observations: np.ndarray, rewards: np.ndarray) -> None:
        """Takes the observations in as float32. Raises `EnvironmentFailure` if there, or a reward, is not finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            self.observations[:] = observations
            kept = rewards.astype(np.float32)
            together = self.observations.sum() + kept.sum()  # finite only if all are: one look instead of two
        if np.isfinite(together) or (np.isfinite(self.observations).all() and np.isfinite(kept).all()):
            return
        bad = int(np.flatnonzero(~np.isfinite(self.observations).all(1) | ~np.isfinite(kept))[0])
        what = f"the reward {rewards[bad]}"
        if not np.isfinite(self.observations[bad]).all():
            what = f"the observation {observations[bad].tolist()}"
        raise failure(self.name, bad, self.seeds()[bad], int(self.steps[bad]), f"gave {what}, which float32 cannot hold")

    @contextmanager
    def _call(self, what: str) -> Iterator[None]:
        """A call of the environments, watched; where they are processes, one that is gone is one that failed."""
        try:
            with self.watch(what, self.steps):
                yield
        except (EOFError, ConnectionError) as error:
            raise EnvironmentFailure(f"{self.name}: the process of an environment ended in a {what}, at the steps "
                                     f"{self.steps.tolist()} of their episodes; nothing was committed") from error


def last_rows(batch: Trajectories) -> np.ndarray:
    """(N,) the last row of each environment."""
    return np.flatnonzero(np.diff(batch.environment, append=-1))


def actions_since_reset(batches: Iterable[Trajectories]) -> list[np.ndarray]:
    """For each environment the actions, (steps, A), of the episode that the newest batch left open; none if it did not.

    `batches`: the newest first; as many are read as the open episodes reach back.
    """
    parts: list[list[np.ndarray]] | None = None
    for batch in batches:
        rows = last_rows(batch)
        if parts is None:
            parts, wanted = [[] for _ in rows], ~batch.ended[rows]
        for i in np.flatnonzero(wanted):
            parts[i].insert(0, batch.actions[rows[i]])
            wanted[i] = batch.start[rows[i]] > 0
        if not wanted.any():
            break
    return [np.concatenate(part) if part else np.zeros((0, 1), np.float32) for part in parts]
