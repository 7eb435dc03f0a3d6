"""The meter of peak memory sees what was taken in between, and nothing from before."""

import subprocess
import sys

import pytest
import torch
from support_text import write_recipe

from fusion_adapters.runs import memory

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


# In a process of its own: one that has run other tests may hold freed memory, or lose pages of mapped files (weights, libraries)
# in between, more than what is measured.
SCRIPT = """
import sys, time, torch
from fusion_adapters.runs import memory
if sys.argv[1] == "looks":
    memory._reset_peak = lambda: False
MIB = 2**18
taken = torch.ones(96 * MIB)  # before: not counted
with memory.PeakMemory() as found:
    held = torch.ones(64 * MIB)
    time.sleep(0.5)  # a hundred looks
    del held
with memory.PeakMemory() as nothing:
    time.sleep(0.05)
print(found.mib, nothing.mib, float(taken[0]))
"""


def test_what_was_taken_and_given_back_counts(way):
    done = subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, timeout=120, check=True)
    found, nothing, _ = map(float, done.stdout.split())
    assert 60 < found < 90
    assert nothing < 20


RUN = """
import sys, torch
from fusion_adapters.runs import memory
from fusion_adapters.runs.recipe import load_recipe
from fusion_adapters.runs.training import run_recipe
if sys.argv[1] == "looks":
    memory._reset_peak = lambda: False
held = torch.ones(256 * 2**18)
del held
high = memory.peak_of_process()
tiny = torch.full((1,), 1e-40)
metrics = run_recipe(load_recipe(sys.argv[2]), sys.argv[3])
assert bool(tiny * 1 == tiny), "a run makes a CPU take such numbers for 0"
print(high, metrics["peak_memory_mib"])
"""


def test_a_run_reports_its_own_memory_and_leaves_denormals_as_they_were(tmp_path, way):
    command = [sys.executable, "-c", RUN, way, str(write_recipe(tmp_path)), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    high, own = map(float, done.stdout.split()[-2:])
    assert own < high - 100 or way == "looks"
