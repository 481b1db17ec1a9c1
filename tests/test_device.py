"""What a process sets before it computes."""

import subprocess
import sys

import pytest
import torch

from stages.ops.device import Device

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


@pytest.mark.parametrize("there, name", [(False, "cpu"), (True, "cuda")])
def test_auto_is_what_torch_finds(monkeypatch, there, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert Device("auto").name == name and Device("cpu").name == "cpu"
