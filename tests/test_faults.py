"""A process that dies, or whose disk fails, at any call of a commit: the same command goes on and ends in the same bytes.

Here one artifact, one state and the record of the run, at each of their calls; `make torture` does all of them.
"""

import resource
import signal

import pytest
import torch
from control import write_control
from faults import HARMLESS_TO_A_FULL_DISK, Faults, same_as_reference
from test_store import CONFIG, recipe

from flows.cli.main import run_command
from flows.runs.produce import StageOutput, write
from flows.runs.verify import verify
from flows.store.store import Store
from schemas.errors import StoreError
from stages.ops.tensor_file import tensor_file


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    work = tmp_path_factory.mktemp("faults")
    example = write_control(work / "small", iterations=2, rollout={"num_steps": 8}, tracking={"enabled": False},
                            policy={"hidden": [4], "normalize_observations": True}, evaluate={"every": 0})
    driver = Faults(example, work)
    driver.points = driver.record()
    yield driver
    driver.close()


def points_of(faults, *labels):
    last = {label: point.label for label in labels for point in faults.points if point.label.startswith(label)}
    return [point for point in faults.points if point.label in last.values()]


def test_killed_before_each_call_and_in_the_middle_of_each_write(faults):
    points = points_of(faults, "rollout", "state", "record")
    assert len(points) > 35 and {"open", "write", "fsync", "link", "unlink", "mkdir"} <= {point.name for point in points}
    for point in points:
        for how in ("before", "half") if point.name == "write" else ("before",):
            assert faults.at(point, how) == {"code": -9, "call": point.name}, (point, how)
            assert faults.go_on()["code"] == 0
            same_as_reference(faults)


def test_a_disk_that_is_full_at_each_write(faults):
    """An error that says so; nothing half written is left but what gc finds; with space again, the same bytes."""
    points = [point for point in points_of(faults, "gae", "state") if point.name not in HARMLESS_TO_A_FULL_DISK]
    assert len(points) > 20
    for point in points:
        said = faults.at(point, "ENOSPC")
        assert said["code"] == 1 and said["faults"], (point, said)
        assert "No space left on device; what was committed before is whole: free some space" in said["error"]
        assert verify(Store(faults.store), None)[1] == []
        assert faults.go_on()["code"] == 0
        same_as_reference(faults)


@pytest.mark.parametrize("how, message", [("EIO", "Input/output error"), ("EROFS", "mounted read-only"),
                                          ("EACCES", "make it readable and writable")])
def test_other_failures_of_a_disk(faults, how, message):
    for point in points_of(faults, "gae")[::5]:
        said = faults.at(point, how)
        assert said["code"] == 1 and message in said["error"], (point, said)
        assert faults.go_on()["code"] == 0
        same_as_reference(faults)


def test_weights_that_do_not_fit_on_the_disk(tmp_path):
    """Where no file may grow beyond 8,000 bytes."""
    def make(attempt):
        attempt.weights("model/model.safetensors", lambda: tensor_file({"weight": torch.zeros(10_000)}))
        return StageOutput()

    store, limits = Store(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
    try:
        with pytest.raises(StoreError, match="File too large; what was committed before is whole"):
            write(store, recipe(), CONFIG.execution, make)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert store.artifacts() == [] and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_store_that_cannot_be_made(trained, tmp_path, capsys):
    """Permissions are nothing to root, so a file stands where its folder has to be."""
    (tmp_path / "file").write_text("")
    assert run_command(["train", str(trained[0]), "--store", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert f"--store {tmp_path / 'file'}: " in error and error.count("\n") == 1
