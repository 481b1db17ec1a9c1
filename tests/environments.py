"""Environments that a user might bring: `environments.py:function` beside a config. Small, exact, or broken on purpose."""

from __future__ import annotations

import os
import time

import gymnasium
import numpy as np
from gymnasium import spaces


class Count(gymnasium.Env):
    """Shows (steps since the reset, the reset's draw). Reward t at step t; ends by itself after `length`, or is cut."""

    def __init__(self, length: int = 5, cut: bool = False, action_space: spaces.Space | None = None) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = action_space or spaces.Discrete(2)
        self.length, self.cut, self.acted = length, cut, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.draw = 0, self.np_random.random()
        return self._show(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.acted.append(action)
        self.steps += 1
        over = self.steps >= self.length
        return self._show(), float(self.steps), over and not self.cut, over and self.cut, {}

    def _show(self):
        return np.array([self.steps, self.draw])


class Fails(Count):
    """Does as `Count` until the third step, or until it is reset."""

    def __init__(self, how: str) -> None:
        super().__init__(length=9)
        self.how = how

    def reset(self, **arguments):
        if self.how == "hangs":
            time.sleep(3600)
        if self.how == "hangs outside of Python":
            sum(range(10**15))
        if self.how == "raises in its second episode" and hasattr(self, "steps"):
            raise RuntimeError("only one")
        return super().reset(**arguments)

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if self.steps == 3:
            if self.how == "raises":
                raise RuntimeError("the gear\nbroke")
            if self.how == "observes NaN":
                observation = np.array([np.nan, 0.0])
            if self.how == "rewards infinity":
                reward = np.inf
            if self.how == "rewards too much":
                reward = 1e39
            if self.how == "calls exit":
                raise SystemExit(0)
            if self.how == "rewards two":
                reward = np.zeros(2)
            if self.how == "steps as Gym did":
                return observation, reward, terminated, info
            if self.how == "rewards text":
                reward = "x"
            if self.how == "shows another shape":
                observation = np.zeros(3)
            if self.how == "shows text":
                observation = np.array(["a", "b"])
            if self.how == "ends twice":
                terminated = np.array([True, False])
            if self.how == "exits":
                os._exit(3)
        return observation, reward, terminated, truncated, info


class Stubborn(Count):
    """Hangs in its first step, and does not want to be closed."""

    def step(self, action):
        time.sleep(3600)

    def close(self):
        raise RuntimeError("display gone")


class Forgets(Count):
    """Its reset does not listen to the seed."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None)


class Varied(Count):
    """Of a length from 2 to 9 that its seed decides."""

    def reset(self, *, seed=None, options=None):
        shown = super().reset(seed=seed)
        self.length = 2 + int(self.draw * 8)
        return shown


def varied():
    return Varied()


def stubborn():
    return Stubborn()


def count(**kwargs):
    return Count(**kwargs)


def fails(how):
    return Fails(how)


class Slow(Count):
    """Every step takes its time, and one for ever."""

    def __init__(self, seconds: float, hangs_at: int | None = None) -> None:
        super().__init__(length=1000)
        self.seconds, self.hangs_at = seconds, hangs_at

    def step(self, action):
        time.sleep(3600 if self.steps + 1 == self.hangs_at else self.seconds)
        return super().step(action)


def slow(seconds, hangs_at=None):
    return Slow(seconds, hangs_at)


def forgets():
    return Forgets(length=100)


def choices(start=0):
    return Count(action_space=spaces.MultiDiscrete([2, 3], start=[start, start]))


def shifted():
    return Count(action_space=spaces.Discrete(3, start=-1))


def narrow(dtype="float32"):
    return Count(action_space=spaces.Box(-0.1, 0.1, (2,), np.dtype(dtype)))


def half_bounded():
    return Count(action_space=spaces.Box(np.array([-np.inf, 0.0], np.float32), np.array([0.5, np.inf], np.float32)))


def pictures():
    environment = Count()
    environment.observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    return environment


def tuples():
    return Count(action_space=spaces.Tuple([spaces.Discrete(2)]))


def of_both():
    return Count(action_space=spaces.Tuple([spaces.Discrete(2), spaces.Box(0, 1, (2,))]))


def nothing():
    return None


def whole_numbers():
    return Count(action_space=spaces.Box(0, 3, (2,), np.int64))


class Odd(Count):
    """Shows fractions in a space of whole numbers; or is reset as Gym's were; or rewards an array of one; or has a mask."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "fractions":
            self.observation_space = spaces.Box(-9, 9, (2,), np.int64)

    def reset(self, **arguments):
        shown, info = super().reset(**arguments)
        if self.how == "old reset":
            return shown
        if self.how == "fractions":
            shown = shown.round()
        return shown, {"action_mask": np.ones(2, np.int8)} if self.how == "mask" else info

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        info = {"action_mask": np.ones(2, np.int8)} if self.how == "step_mask" else info
        return observation, np.array([reward]) if self.how == "array" else reward, terminated, truncated, info


def odd(how):
    return Odd(how)


def acts_in(space):
    """With an action space of that kind."""
    return Count(action_space={
        "binary": spaces.MultiBinary(3), "matrix": spaces.Box(-1, 1, (2, 3)), "whole": spaces.Box(0, 4, (2,), np.int32),
        "tuple": spaces.Tuple((spaces.Discrete(2), spaces.Box(0, 1, (1,)))), "far": spaces.Box(100, 101, (2,)),
        "wide": spaces.Box(0, 1000, (1,)), "unit": spaces.Box(-1, 1, (1,)),
        "binary matrix": spaces.MultiBinary((2, 2))}[space])


def shows(space):
    """With an observation space of that kind."""
    environment = Count()
    environment.observation_space = {
        "sequence": spaces.Sequence(spaces.Box(0, 1, (2,))),
        "pair": spaces.Tuple((spaces.Discrete(2), spaces.Discrete(3)))}[space]
    return environment


class Shows(Count):
    """Shows samples of any space, a function of the reset's draw and the step; takes actions of any space."""

    def __init__(self, seen: str = "plain", acts: str = "choice", masks: str = "") -> None:
        super().__init__(length=4, action_space=ACTS[acts])
        self.masks = masks
        if seen != "plain":
            self.observation_space = SEEN[seen]
        self.seen = seen

    def _show(self):
        if self.seen == "plain":
            return super()._show()
        self.observation_space.seed(int(self.draw * 1e6) + self.steps)
        return self.observation_space.sample()

    def reset(self, **arguments):
        shown, _ = super().reset(**arguments)
        return shown, self._info()

    def step(self, action):
        shown, reward, terminated, truncated, _ = super().step(action)
        return shown, reward, terminated, truncated, self._info()

    def _info(self):
        allowed = np.arange(self.action_space.n) % 3 == self.steps % 3 if self.masks else None
        return {"": {}, "right": {"action_mask": allowed}, "none": {"action_mask": np.zeros(5)},
                "short": {"action_mask": np.ones(2)}, "late": {} if self.steps else {"action_mask": allowed}}[self.masks]


SEEN = {
    "dict": spaces.Dict({"speed": spaces.Box(-1, 1, (2,)), "gear": spaces.Discrete(3)}),
    "tuple": spaces.Tuple((spaces.Discrete(2), spaces.MultiBinary(3))), "discrete": spaces.Discrete(7, start=2),
    "multi": spaces.MultiDiscrete([2, 3]), "matrix": spaces.Box(-1, 1, (2, 3)),
    "image": spaces.Box(0, 255, (9, 8, 3), np.uint8),
    "cube": spaces.Box(0, 1, (4, 3, 2)), "frames": spaces.Box(0, 255, (4, 9, 8), np.uint8),
    "gray": spaces.Box(0, 255, (9, 8), np.uint8)}
ACTS = {
    "choice": spaces.Discrete(2), "five": spaces.Discrete(5),
    "tuple": spaces.Tuple((spaces.Discrete(3, start=1), spaces.MultiBinary(2), spaces.MultiDiscrete([4, 2]))),
    "dict": spaces.Dict({"turn": spaces.Discrete(2), "jump": spaces.MultiBinary(1)}),
    "boxes": spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.Box(0, 9, (1,)))), "matrix": spaces.Box(-1, 1, (2, 3)),
    "binary matrix": spaces.MultiBinary((2, 2)),
    "far": spaces.Box(np.array([100, -3], np.float32), np.array([101, 9], np.float32))}


def of_spaces(seen="plain", acts="choice", masks=""):
    return Shows(seen, acts, masks)
