"""Trains a run in processes that die, or whose disk fails, at a given call of the operating system below the store.

Every call that changes the store is a fault point: making a folder, opening a file to write, writing, closing, syncing,
linking, removing. They are counted from the beginning of each artifact or record, its label, so that all can be enumerated:
`Faults.record` trains once without any and keeps what the store was at the beginning of each label.

The processes are forks of one that has everything imported (`python tests/faults.py`), without Prefect between the stages.
"""

from __future__ import annotations

import builtins
import errno
import gc
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

KILLS = ("before", "half", "after")
HARMLESS_TO_A_FULL_DISK = ("unlink", "rmdir", "chmod", "close")


@dataclass(frozen=True)
class Point:
    """A call below the store."""

    label: str  # the artifact or record that is being made
    call: int  # of that label, from 0
    name: str  # of the function
    file: str  # what it was about


class Faults:
    """Drives the process that forks."""

    def __init__(self, example: Path, work: Path) -> None:
        self.example, self.work = example, work
        self.snapshots, self.store = work / "snapshots", work / "store"
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def record(self) -> list[Point]:
        """All points of a run that nothing disturbs."""
        answer = self._ask(store=self.work / "reference", snapshots=self.snapshots)
        assert answer["code"] == 0, answer
        return [Point(**point) for point in answer["points"]]

    def at(self, point: Point, how: str) -> dict:
        """Begins where the store was at the point's label. `how`: `before`, `half` or `after`, or an errno's name."""
        shutil.rmtree(self.store, ignore_errors=True)
        shutil.copytree(self.snapshots / point.label.replace("/", "_"), self.store)
        return self.again_at(point, how)

    def again_at(self, point: Point, how: str) -> dict:
        """Goes on in the store as it is; killed at the point, or, where the label has fewer calls, when the next begins."""
        return self._ask(store=self.store, point=asdict(point), how=how)

    def go_on(self, seconds: float | None = None) -> dict:
        """The same command, undisturbed, or killed after so many seconds."""
        return self._ask(store=self.store, seconds=seconds)

    def _ask(self, **what: object) -> dict:
        print(json.dumps({"example": self.example} | what, default=str), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def same_as_reference(faults: Faults) -> None:
    """Every state, and every file of every artifact, as in the run that nothing disturbed; nothing damaged."""
    from flows.runs.verify import verify
    from flows.store.store import Store

    assert contents(faults.store) == contents(faults.work / "reference")
    assert verify(Store(faults.store), None)[1] == []


def contents(root: Path) -> dict:
    """States, their seconds aside, and digests of artifacts."""
    from flows.runs.run import open_run, run_names
    from flows.store.store import Store

    store = Store(root)
    states = {name: [state.model_copy(update={"seconds": 0}) for state in open_run(store, name).states()]
              for name in run_names(store)}
    return states | {str(ref): store.manifest(ref).digests() for ref in store.artifacts()}


# --- the process that forks ---

def main() -> None:
    import prefect
    import prefect.utilities.annotations

    prefect.utilities.annotations.quote = lambda value: value
    prefect.flow = prefect.task = lambda function=None, **_: function if function else lambda wrapped: wrapped
    import torch
    from trl import RewardTrainer, SFTTrainer  # noqa: F401 - imported once, for all children

    from flows import train  # noqa: F401
    from flows.control import control_chain, control_tasks  # noqa: F401
    from flows.language import check_inputs, language_chain, language_tasks  # noqa: F401
    from flows.store import attempt
    from stages.ops import trainer  # noqa: F401

    torch.set_num_threads(1)
    attempt.CONCURRENT_SYNCS = 1  # so that calls come in the same order each time
    gc.collect()
    gc.freeze()  # else each child's collector would touch, and so copy, all that was imported

    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), flush=True)


def _fork(asked: dict) -> dict:
    """The code of a child that trains, and what it said; -9 if it was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        with os.fdopen(write, "w") as answer:
            json.dump(_train(asked, answer), answer)
        os._exit(0)
    os.close(write)
    if asked.get("seconds") is not None and not select.select([read], [], [], asked["seconds"])[0]:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read) as answer:
        said = answer.read()
    _, status = os.waitpid(child, 0)
    return json.loads(said) if said else {"code": os.waitstatus_to_exitcode(status)}


def _train(asked: dict, said: TextIO) -> dict:
    from flows.chains import check_inputs
    from flows.opening import opened
    from flows.runs.start import Request, start
    from flows.train import train_flow
    from schemas.errors import BatonError
    from schemas.settings import Overrides, TrackingConfig

    watch, untracked = Watch(asked, said), Overrides(tracking=TrackingConfig(enabled=False))
    try:
        watch.begin("record of the run")
        with watch:
            run = start(Request(asked["store"], source=asked["example"], overrides=untracked), check_inputs)
            with opened(run):
                train_flow(run.name, store=asked["store"])
    except BatonError as error:
        return {"code": 1, "error": str(error), "faults": watch.faults}
    except BaseException as error:
        return {"code": 70, "error": f"{type(error).__name__}: {error}", "faults": watch.faults}
    return {"code": 0, "points": [asdict(point) for point in watch.points], "faults": watch.faults}


class Watch:
    """Counts the calls below a store, and makes one of them fatal, or it and all later ones that need space fail."""

    def __init__(self, asked: dict, said: TextIO) -> None:
        self.said = said
        self.root, self.snapshots = os.path.abspath(asked["store"]), asked.get("snapshots")
        self.fatal, self.how = asked.get("point"), asked.get("how")
        self.points: list[Point] = []
        self.label, self.call, self.failing, self.faults, self.inside = "", 0, False, 0, False

    def begin(self, label: str) -> None:
        """What follows is about this artifact or record."""
        if self.fatal and self.label == self.fatal["label"] and self.how in KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        self.label, self.call = label, 0
        if self.snapshots:
            Path(self.root).mkdir(exist_ok=True)
            place = Path(self.snapshots, label.replace("/", "_"))
            if not place.exists():
                shutil.copytree(self.root, place)

    def __enter__(self) -> None:
        from flows.runs.run import Run
        from flows.store.local import LocalFiles

        begin, save = LocalFiles.begin, Run.save
        LocalFiles.begin = lambda files, key: (self.begin("/".join(key.split("/")[1:3])[:-52]), begin(files, key))[1]
        Run.save = lambda run, state: (self.begin(f"state {state.iteration}"), save(run, state))[1]
        for name in ("mkdir", "fsync", "link", "unlink", "rmdir", "chmod"):
            self._wrap(name)
        opened = builtins.open
        builtins.open = io.open = lambda file, mode="r", *more, **options: self._open(opened, file, mode, *more, **options)

    def __exit__(self, *_: object) -> None:
        pass  # the process ends with it

    def _wrap(self, name: str) -> None:
        call = getattr(os, name)

        def watched(first, *more, **options):
            about = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
            return self.around(name, about, lambda: call(first, *more, **options), parent=options.get("dir_fd"))

        setattr(os, name, watched)

    def _open(self, call, file, mode="r", *more, **options):
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return call(file, mode, *more, **options)
        opened = self.around("open", os.fspath(file), lambda: call(file, mode, *more, **options))
        return File(self, opened, os.fspath(file)) if self._below(os.fspath(file)) else opened

    def _below(self, path: str) -> bool:
        path = os.path.abspath(path)
        return path.startswith(f"{self.root}/") and not path.endswith(("/lease", "/.writable"))

    def around(self, name: str, path: str, call, half=None, parent: int | None = None):
        """The call, which is the fatal one or fails if it has to; `half`: as much of it as a crash may leave."""
        if parent is not None:
            path = f"{os.readlink(f'/proc/self/fd/{parent}')}/{path}"
        if self.inside or not self._below(path):
            return call()
        self.points.append(Point(self.label, self.call, name, os.path.basename(path)))
        here = self.fatal and (self.label, self.call) == (self.fatal["label"], self.fatal["call"])
        self.call += 1
        if here and self.how == "before":
            self._die(name)
        if here and self.how == "half" and half:
            half()
            self._die(name)
        if (here or self.failing) and self.how and self.how.startswith("E"):
            self.failing = True
            if name not in HARMLESS_TO_A_FULL_DISK or self.how in ("EROFS", "EIO"):
                self.faults += 1
                raise OSError(getattr(errno, self.how), os.strerror(getattr(errno, self.how)), path)
        self.inside = True
        try:
            return call()
        finally:
            self.inside = False
            if here and self.how == "after":
                self._die(name)

    def _die(self, name: str) -> None:
        json.dump({"code": -9, "call": name}, self.said)
        self.said.flush()
        os.kill(os.getpid(), signal.SIGKILL)


class File:
    """A file that is being written."""

    def __init__(self, watch: Watch, file, path: str) -> None:
        self._watch, self._file, self._path = watch, file, path

    def write(self, data):
        def half():
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        return self._watch.around("write", self._path, lambda: self._file.write(data), half)

    def close(self):
        return self._watch.around("close", self._path, self._file.close)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __iter__(self) -> Iterator:
        return iter(self._file)

    def __getattr__(self, name):
        return getattr(self._file, name)


if __name__ == "__main__":
    main()
