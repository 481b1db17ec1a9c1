"""Where models run: which device, with how many threads, in which precision."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class Device:
    """A device of torch."""

    name: str = "cpu"
    """`auto` becomes the one that torch finds."""

    def __post_init__(self) -> None:
        if self.name == "auto":
            object.__setattr__(self, "name", "cuda" if torch.cuda.is_available() else "cpu")

    @property
    def torch(self) -> torch.device:
        """As torch's own functions take it."""
        return torch.device(self.name)

    @property
    def available(self) -> bool:
        """Whether torch finds it here."""
        return self.name == "cpu" or torch.cuda.is_available()

    @property
    def count(self) -> int:
        """How many ranks there can be: one a GPU; on the CPU as many as one likes."""
        return sys.maxsize if self.name == "cpu" else torch.cuda.device_count()

    @property
    def description(self) -> str:
        """The hardware, and the instructions that kernels are chosen by, since both decide last bits."""
        return _processor() if self.name == "cpu" else torch.cuda.get_device_name(self.torch)

    def autocast(self, precision: str) -> AbstractContextManager:
        """The forward pass in `precision`: float32 as it is, or bfloat16 where autocast has it."""
        return torch.autocast(self.torch.type, torch.bfloat16, enabled=precision == "bfloat16")

    def use_threads(self, threads: int | None) -> None:
        """CPU threads of this thread's operations; before anything is computed, since last bits depend on their number."""
        if threads is not None and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def threads_kept() -> Iterator[None]:
    """Afterwards this thread's operations take as many threads as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        Device().use_threads(before)


# --- cores ---

_BOUND = threading.Lock()

@contextmanager
def bound_to_cores() -> Iterator[None]:
    """Inside it each of this thread's OpenMP threads stays on a core of its own, if there are as many threads as cores.

    They wait for each other by spinning. Where another process takes a core, two of them otherwise come to share the
    other one, and each waits for a time slice while the one that it waits for has none: ten times as long. The calling
    thread is free again afterwards, so that threads and processes that it starts elsewhere go where they like.
    """
    allowed = _affinity()
    if allowed is None or torch.cuda.is_initialized() or not _BOUND.acquire(blocking=False):
        yield  # products are a GPU's, or another stage of this process has the cores
        return
    try:
        placed = _place_openmp_threads(torch.get_num_threads(), allowed)
        try:
            yield
        finally:
            if placed:
                os.sched_setaffinity(0, allowed)
    finally:
        _BOUND.release()


def _affinity() -> frozenset[int] | None:
    """Processors that this thread may run on; none where a system does not say."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _place_openmp_threads(threads: int, allowed: frozenset[int]) -> bool:
    """Each thread of the calling thread's team to its core; whether it was done."""
    cores = _cores(allowed) if threads < len(allowed) else tuple(frozenset({processor}) for processor in sorted(allowed))
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)  # of GNU's library, and of Intel's for programs made for it
    if threads < 2 or threads != len(cores) or parallel is None:
        return False
    number, failed = ctypes.CDLL(None).omp_get_thread_num, []

    def place(_: object) -> None:
        try:
            os.sched_setaffinity(0, cores[number()])
        except OSError as error:
            failed.append(error)

    parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(place), None, threads, 0)
    if failed:
        os.sched_setaffinity(0, allowed)
    return not failed


@cache
def _cores(allowed: frozenset[int]) -> tuple[frozenset[int], ...]:
    """The processors of each core, of those that are allowed."""
    found = {}
    for processor in sorted(allowed):
        siblings = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        found.setdefault(siblings.read_text() if siblings.is_file() else processor, set()).add(processor)
    return tuple(map(frozenset, found.values()))


# --- memory ---

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h


@cache
def keep_freed_memory() -> bool:
    """Has glibc keep what tensors leave, in this process from now on; whether it does.

    By default a large block goes back to the system when it is freed, and each of its pages is fetched and cleared again for
    the next step's tensors: a third of a rollout's time on virtual machines, where that is slow.
    """
    return _mallopt(M_MMAP_MAX, 0) and _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@cache
def release_large_blocks() -> bool:
    """Has blocks of 32 MB and more, the most that glibc lets one say, go back to the system after all; whether it does.

    Of the logits of a large vocabulary each block that is kept ends up with some small tensor in it, and the next one takes
    new memory: 6 GB where 0.6 are needed.
    """
    return _mallopt(M_MMAP_THRESHOLD, 2**25) and _mallopt(M_MMAP_MAX, 65536)


def _mallopt(option: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).mallopt(option, value))
    except (OSError, AttributeError):  # another C library
        return False


@cache
def _processor() -> str:
    """For example `AMD EPYC 7B13, AVX2`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
