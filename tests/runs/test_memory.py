"""The meter of peak memory sees what was taken in between, and nothing from before."""

import time

import pytest
import torch

from fusion_adapters.runs import memory
from fusion_adapters.runs.memory import PeakMemory

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the meter reads the GPU's memory")
MIB = 2**18  # float32 values


@pytest.fixture(params=["mark", "looks"], autouse=True)
def way(request, monkeypatch):
    """By the kernel's own mark, or, where the system keeps none, by looking again and again."""
    if request.param == "looks":
        monkeypatch.setattr(memory, "_reset_peak", lambda: False)
    elif not memory.CLEAR.exists():
        pytest.skip("the system keeps no mark")


def test_what_was_taken_and_given_back_counts():
    taken = torch.ones(96 * MIB)  # before: not counted
    with PeakMemory() as found:
        held = torch.ones(64 * MIB)
        time.sleep(0.5)  # a hundred looks
        del held
    assert 60 < found.mib < 90
    with PeakMemory() as nothing:
        time.sleep(0.05)
    assert nothing.mib < 20
    assert taken[0] == 1
