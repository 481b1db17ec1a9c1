"""The animated picture of an episode, where the environment renders."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable

import gymnasium
import numpy as np
from PIL import Image

from flows.environments import Watch
from stages.control_evaluate import film
from stages.ops.policies import Actor

log = logging.getLogger("baton")
FRAMES = 150  # of a longer episode every second, fourth … is kept, so that there are one to two times so many
WIDTH = 300  # pixels at most


def film_of(make: Callable[[], gymnasium.Env], actor: Actor, watch: Watch, *, seed: int, max_steps: int) -> bytes | None:
    """A GIF of the episode with that seed; None, after saying why, where the environment cannot render.

    `make`: gives the environment with `render_mode="rgb_array"`.
    """
    try:
        with watch:
            environment = make()
            stride, images = _thinned(film(actor, environment, watch, seed=seed, max_steps=max_steps))
            rate = environment.metadata.get("render_fps", 30)
            environment.close()
        return _gif(images, stride / rate)
    except Exception as error:  # a picture is worth no training: whatever a renderer lacks
        log.info(f"no picture of an episode: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None


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
