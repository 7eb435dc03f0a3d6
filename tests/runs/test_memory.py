"""The meter of peak memory sees what was taken in between, and nothing from before."""

import gc
import time

import pytest
import torch
from support_text import write_recipe

from fusion_adapters.runs import memory
from fusion_adapters.runs.memory import PeakMemory
from fusion_adapters.runs.recipe import load_recipe
from fusion_adapters.runs.training import run_recipe

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the meter reads the GPU's memory")
MIB = 2**18  # float32 values


@pytest.fixture(params=["mark", "looks"], autouse=True)
def way(request, monkeypatch):
    """By the kernel's own mark, or, where the system keeps none, by looking again and again."""
    if request.param == "looks":
        monkeypatch.setattr(memory, "_reset_peak", lambda: False)
    elif not memory.CLEAR.exists():
        pytest.skip("the system keeps no mark")
    return request.param


def test_what_was_taken_and_given_back_counts():
    gc.collect()  # garbage of other tests, given back meanwhile, would hide what is taken
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


def test_a_run_reports_its_own_memory_and_leaves_denormals_as_they_were(tmp_path, way):
    held = torch.ones(256 * MIB)
    del held
    high = memory.peak_of_process()
    tiny = torch.full((1,), 1e-40)
    metrics = run_recipe(load_recipe(write_recipe(tmp_path)), tmp_path / "run")
    assert bool(tiny * 1 == tiny), "a run makes a CPU take such numbers for 0"
    assert metrics["peak_memory_mib"] < high - 100 or way == "looks"
