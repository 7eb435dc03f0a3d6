"""What runs here: cores and versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import accelerate
import peft
import torch
import transformers


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """What a result was made with: python, this package and those that compute."""
    libraries = {m.__name__: m.__version__ for m in (torch, transformers, peft, accelerate)}
    return {"python": platform.python_version(), "fusion_adapters": version("fusion-adapters"), **libraries}
