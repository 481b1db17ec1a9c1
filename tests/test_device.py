"""What a process sets before it computes."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stages.ops.device import Device, bound_to_cores

MEASURE = """
import torch
from stages.ops.device import keep_freed_memory
kept = {keep} and keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
torch.ones(1)
before = resident()
tensor = torch.ones(2**25)  # 128 MB
del tensor
print(kept, resident() - before > 2**26)
"""


@pytest.mark.parametrize("keep", [True, False])
def test_what_a_tensor_leaves_is_kept_by_the_process(keep):
    out = subprocess.run([sys.executable, "-c", MEASURE.format(keep=keep)], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [str(keep), str(keep)]


PLACES = """
import json, os, torch
from stages.ops.device import _cores, bound_to_cores
places = lambda: {thread: sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}
torch.set_num_threads(THREADS)
free = places()
with bound_to_cores():
    torch.ones(2**22).exp()
    inside = places()
    with bound_to_cores():
        nested = places()
print(json.dumps([[sorted(core) for core in _cores(frozenset(os.sched_getaffinity(0)))], str(os.getpid()), free, inside,
                  nested, places()]))
"""


def places(threads):
    code = PLACES.replace("THREADS", threads)
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_as_many_threads_as_cores_have_one_each_while_they_compute_and_the_caller_is_free_afterwards():
    cores, main, free, inside, nested, after = places("len(_cores(frozenset(os.sched_getaffinity(0))))")
    if len(cores) == 1:
        cores = [free[main]]
    assert inside[main] == cores[0] and after[main] == free[main]
    assert sorted(inside[thread] for thread in inside if thread not in free or thread == main) == sorted(cores)
    assert nested == inside


def test_fewer_threads_than_cores_go_where_they_like():
    _, _, free, inside, _, after = places("1")
    assert {thread: inside[thread] for thread in free} == free == {thread: after[thread] for thread in free}


def test_one_stage_at_a_time_has_the_cores():
    free = os.sched_getaffinity(0)
    with bound_to_cores(), ThreadPoolExecutor(1) as pool:
        def beside():
            os.sched_setaffinity(0, free)  # a thread begins with what its maker has
            torch.set_num_threads(len(free))
            with bound_to_cores():
                return os.sched_getaffinity(0)

        assert pool.submit(beside).result() == free


def test_cores_are_given_back_by_what_fails():
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), bound_to_cores():
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("there, name", [(False, "cpu"), (True, "cuda")])
def test_auto_is_what_torch_finds(monkeypatch, there, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert Device("auto").name == name and Device("cpu").name == "cpu"
