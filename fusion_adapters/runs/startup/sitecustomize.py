"""Runs at the start of every Python below `fusion-adapters exec`, which puts this folder on `PYTHONPATH`: registers the method.

Python imports a `sitecustomize` at each start, the first on its path; the one that this one stands before, if any, runs after it.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import PathFinder

FOLDER = os.path.dirname(os.path.abspath(__file__))


def _register() -> None:
    try:
        importlib.import_module("fusion_adapters")  # cheap: the method itself comes with peft
    except ImportError as error:
        if PathFinder.find_spec("peft") is not None:
            print(
                f"fusion-adapters exec: {sys.executable} has peft, and not the package fusion-adapters ({error}), so it will not load "
                "fusion adapters. Install the package there (pip install fusion-adapters).",
                file=sys.stderr,
            )


def _run_next() -> None:
    folders = [os.path.abspath(folder) for folder in sys.path]
    spec = PathFinder.find_spec("sitecustomize", sys.path[folders.index(FOLDER) + 1 :] if FOLDER in folders else sys.path)
    if spec is None or spec.loader is None or spec.origin is None or os.path.dirname(spec.origin) == FOLDER:
        return
    from importlib.util import module_from_spec  # not at every start

    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


_register()
_run_next()
