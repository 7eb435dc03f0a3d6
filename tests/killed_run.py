"""Kills extractions at many moments and goes on with them, for states/test_kills.py. Usage: ... killed_run.py FOLDER TIMES"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from support import attached
from support_cache import cached, some_rows

from fusion_adapters.states import LayerStateCache

torch.set_num_threads(1)
root, times = Path(sys.argv[1]), int(sys.argv[2])
model, rows, draw = attached(), some_rows(200), random.Random(0)
options = {"batch_size": 8, "shard_bytes": 20_000}
started = time.time()
cached(model, rows, root / "whole", **options)
took = time.time() - started
expected = {p.name: p.read_bytes() for p in (root / "whole").iterdir()}


def hidden(folder):
    """What a run is writing, its lock left out."""
    with contextlib.suppress(FileNotFoundError):
        return [p for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    return []


def kill_itself(number, before):
    """Makes this process die where it gives a file its name, for the `number`-th time."""
    replace, count = Path.replace, itertools.count(1)

    def dying(self, target):
        last = next(count) == number
        if not (last and before):
            replace(self, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.replace = dying


def begin(folder, kill_at=None, before=False):
    process = os.fork()
    if not process:
        try:
            if kill_at is not None:
                kill_itself(kill_at, before)
            cached(model, rows, folder, **options)
        finally:
            os._exit(0)
    return process


def end(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def at_any_moment(folder, part=0.9):
    process = begin(folder)
    time.sleep(part * took * draw.random())
    end(process)


def while_it_writes(folder):
    """Before or after a file gets its own name: the index, the manifest, or one of the shards."""
    process = begin(folder, kill_at=draw.randrange(1, 9), before=draw.random() < 0.7)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), "the run ended before it wrote so many files"


def twice(folder):
    at_any_moment(folder, 0.4)
    at_any_moment(folder, 0.6)


kills, left, resumed, half = Counter(), Counter(), Counter(), Counter()
ways = {"at any moment": at_any_moment, "while a file is written": while_it_writes, "and again in the resume": twice}
for i in range(times):
    name = list(ways)[i % len(ways)]
    folder = root / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    ways[name](folder)
    kills[name] += 1 + (name == "and again in the resume")
    left[name] += bool(hidden(folder))
    try:
        LayerStateCache(folder, model)
    except (ValueError, FileNotFoundError):  # not begun, or not complete
        half[name] += 1
    cached(model, rows, folder, **options)
    resumed[name] += {p.name: p.read_bytes() for p in folder.iterdir()} == expected
for name in ways:
    print(f"| killed {name} | {kills[name]} | {half[name]} | {left[name]} | {resumed[name]} |")
print(f"{sum(resumed.values())} of {times} resumed, {sum(kills.values())} kills, dead runs' files: {sum(left.values())}")
