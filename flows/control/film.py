"""The animated picture of an episode, where the environment renders."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

import gymnasium
import numpy as np
from PIL import Image

from flows.control.environments import Watch, make_environment
from flows.control.spaces import fitted
from schemas.control import EnvironmentConfig
from stages.control_evaluate import film
from stages.ops.networks import Actor

log = logging.getLogger("baton")
FRAMES = 150  # of a longer episode every second, fourth … is kept, so that there are one to two times so many
WIDTH = 300  # pixels at most
_END = object()


def film_of(
    config: EnvironmentConfig, function: Callable[..., gymnasium.Env] | None, actor: Actor, *, seed: int, max_steps: int,
    timeout: float,
) -> bytes | None:
    """A GIF of the episode with that seed; None, after saying why, where the environment cannot render.

    `function`: the user's that makes the environment, if there is one.
    """
    if function is not None and not _takes(function, "render_mode"):
        return None
    watch = Watch(config.id, timeout)
    try:
        with warnings.catch_warnings(action="ignore"):
            environment, _ = fitted(make_environment(config, function, render_mode="rgb_array"), config)
            with closing(environment):
                frames = film(actor, environment, seed=seed, max_steps=max_steps)
                stride, images = _thinned(_watched(frames, watch))
                return _gif(images, stride / environment.metadata.get("render_fps", 30))
    except Exception as error:  # a picture is worth no training: whatever a renderer lacks
        log.info(f"no picture of an episode: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None


def _takes(function: Callable[..., object], name: str) -> bool:
    """Whether the function has a parameter of that name, or any."""
    parameters = inspect.signature(function).parameters.values()
    return any(one.name == name or one.kind is one.VAR_KEYWORD for one in parameters)


def _watched(frames: Iterator[np.ndarray], watch: Watch) -> Iterator[np.ndarray]:
    """The frames, of which each must come in time."""
    while True:
        with watch("a picture"):
            frame = next(frames, _END)
        if frame is _END:
            return
        if frame is None:
            raise TypeError("its render() gave nothing")
        yield frame


def _thinned(frames: Iterable[np.ndarray]) -> tuple[int, list[Image.Image]]:
    """Every so many of the (height, width, 3) uint8 frames, at most WIDTH wide; never more than twice FRAMES in memory."""
    stride, images = 1, []
    for i, frame in enumerate(frames):
        if i % stride == 0:
            image = Image.fromarray(frame)
            images.append(image.resize((WIDTH, round(image.height * WIDTH / image.width))) if image.width > WIDTH else image)
        if len(images) > 2 * FRAMES:
            stride, images = 2 * stride, images[::2]
    return stride, images


def _gif(images: list[Image.Image], seconds: float) -> bytes:
    """`seconds`: how long each of the images is shown."""
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=round(1000 * seconds), loop=0)
    return file.getvalue()
