"""The peak of memory while something runs, above what was there before."""

from __future__ import annotations

import threading
from typing import Any

import psutil
import torch

INTERVAL = 0.02  # seconds between two looks


class PeakMemory:
    """A context whose `mib` is the highest memory in its body above that at its start, in MiB.

    On CUDA that of the allocator, else the resident memory of the process, looked at fifty times a second.
    """

    def __init__(self) -> None:
        self.mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        self._before = self._highest = psutil.Process().memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            self._stop.set()
            self._thread.join()
            peak = self._highest
        self.mib = round((peak - self._before) / 2**20, 1)

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(INTERVAL):
            self._highest = max(self._highest, process.memory_info().rss)
