"""The peak of memory: of the whole process, or while something runs."""

from __future__ import annotations

import contextlib
import platform
import threading
from pathlib import Path
from typing import Any

import psutil
import torch

INTERVAL = 0.005  # seconds between two looks, where the system keeps no peak
# Linux: writing 5 makes the process's peak its present size (man 5 proc).
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """A context whose `mib` is the highest memory in its body above that at its start, in MiB.

    On CUDA that of the allocator; else the resident memory of the process, on Linux by the kernel's own mark, elsewhere
    by looking every few milliseconds.
    """

    def __init__(self) -> None:
        self.mib = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        self._before = self._highest = psutil.Process().memory_info().rss
        if not _reset_peak():
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        elif self._thread is None:
            peak = _peak()
        else:
            self._stop.set()
            self._thread.join()
            peak = self._highest
        self.mib = round((peak - self._before) / 2**20, 1)

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(INTERVAL):
            self._highest = max(self._highest, process.memory_info().rss)


def _reset_peak() -> bool:
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")
        return STATUS.is_file()
    return False


def _peak() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """Lets `peak_of_process` begin anew, so that a run does not report what ran before it in the process; macOS and Windows cannot."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        _reset_peak()


def peak_of_process() -> float:
    """Peak memory in MiB: of the allocator on CUDA, else of the process; on both since `forget_peak`."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    if STATUS.is_file():
        return round(_peak() / 2**20, 1)
    if platform.system() == "Windows":
        return round(psutil.Process().memory_info().peak_wset / 2**20, 1)  # type: ignore[attr-defined]
    import resource

    per_mib = 2**20 if platform.system() == "Darwin" else 1024  # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_mib, 1)
