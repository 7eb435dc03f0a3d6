"""What runs here: cores and versions; and how it computes and what it reports for a while."""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Iterator
from importlib.metadata import version

import accelerate
import peft
import torch
import transformers


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def denormals_flushed() -> Iterator[None]:
    """In the body, or in the function that it decorates, a CPU takes denormal numbers for 0; afterwards it does as before.

    Sharp softmaxes over depth make such numbers, on which a CPU is several times slower.
    """
    if torch.cuda.is_available():
        yield
        return
    before = bool(torch.full((1,), 1e-40) * 1 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers and peft report of a model that is built: it is never used."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def versions() -> dict[str, str]:
    """What a result was made with: python, this package and those that compute."""
    libraries = {m.__name__: m.__version__ for m in (torch, transformers, peft, accelerate)}
    return {"python": platform.python_version(), "fusion_adapters": version("fusion-adapters"), **libraries}
