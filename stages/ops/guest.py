"""Calls of what a user brings, such as a reward function: what it does wrong ends as an error that names it.

What it prints goes to stderr, what it changes of torch's and NumPy's switches is put back, its exit is an error, an error of
its own is told with its file and line, and a call that does not return is named and, past a limit, ended.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
import traceback
import types
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from schemas.errors import BatonError
from stages.ops.user_errors import said

log = logging.getLogger("baton")


@dataclass(frozen=True)
class Patience:
    """How long a call may take, in seconds."""

    warning: float = 30.0
    """After it, and again and again, a line names the call."""
    limit: float | None = None
    """After it the call is ended; null: never."""


FOREVER = Patience()


class HungError(BaseException):
    """Not an `Exception`, so that what is ended does not catch it."""


def call_guest(
    name: str, function: Callable[..., Any], *arguments: Any, error: type[BatonError], patience: Patience = FOREVER
) -> Any:
    """What the function returns. Raises `error`, whose message begins with `name`."""
    watch = _Watch(name, patience)
    try:
        try:
            with switches_kept(), redirect_stdout(sys.stderr):
                return function(*arguments)
        finally:
            watch.end()
    except BatonError:
        raise
    except HungError:
        raise error(f"{name} has not returned for {patience.limit:g} s (execution.function_timeout sets the limit)"
                    ) from None
    except (Exception, SystemExit, GeneratorExit, CancelledError) as raised:
        log.debug("".join(traceback.format_exception(raised)))
        raise error(f"{name} {said(raised)}") from raised


# --- switches ---

SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "torch's gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (
        torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    "torch's threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda flags: torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])),
    "torch's precision of products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch's anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "NumPy's answer to errors": (np.geterr, lambda answers: np.seterr(**answers)),
    "the working directory": (os.getcwd, os.chdir),
}


@contextmanager
def switches_kept() -> Iterator[None]:
    """What is switched inside is switched back at the end."""
    before = {name: read() for name, (read, _) in SWITCHES.items()}
    try:
        yield
    finally:
        for name, (read, write) in SWITCHES.items():
            if read() != before[name]:
                write(before[name])


# --- time ---

class _Watch:
    """Names a call of this thread that does not return, and ends it past the limit."""

    def __init__(self, name: str, patience: Patience) -> None:
        self.name, self.patience, self.thread = name, patience, threading.get_ident()
        self._in_main = threading.current_thread() is threading.main_thread() and hasattr(signal, "pthread_kill")
        if patience.limit is not None and self._in_main:
            signal.signal(signal.SIGALRM, ring)
        self._over, self._lock, self._returned = threading.Event(), threading.Lock(), False
        threading.Thread(target=self._run, daemon=True).start()

    def end(self) -> None:
        """The call has returned: nothing rings from here on."""
        self._returned = True  # first, and in one step: it may ring in the middle of the next
        try:
            with self._lock:
                self._over.set()
        except HungError:
            self._over.set()
            raise

    def _run(self) -> None:
        began, limit = time.monotonic(), self.patience.limit
        tell = began + self.patience.warning
        ends = float("inf") if limit is None else began + limit
        while not self._over.wait(max(min(tell, ends) - time.monotonic(), 0)):
            now = time.monotonic()
            if now >= ends:
                self._ring()
                ends = now + 1  # again, in case it was caught
            if now >= tell:
                log.warning("%s has not returned for %.0f s", self.name, now - began)
                tell = now + self.patience.warning

    def _ring(self) -> None:
        with self._lock:
            if self._returned:
                return
            if self._in_main:  # a signal ends what waits in the system too
                signal.pthread_kill(self.thread, signal.SIGALRM)
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), ctypes.py_object(HungError))


def ring(_: int, __: types.FrameType | None) -> None:
    """As a signal handler: raises `HungError`."""
    raise HungError
