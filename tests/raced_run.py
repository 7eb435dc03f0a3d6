"""Extractions that meet in one folder, for states/test_kills.py. Usage: ... raced_run.py FOLDER TIMES

Two of other weights, or of the same, by two processes or two threads; and a folder that is deleted, or deleted and begun again by
another, under a running one.
"""

import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from support import attached, tiny
from support_cache import cached, pad, some_rows

from fusion_adapters.states import LayerStateCache, StaleCacheError, cache_layer_states

torch.set_num_threads(1)
root, times = Path(sys.argv[1]), int(sys.argv[2])
rows, draw = some_rows(60), random.Random(0)
models = [attached(), attached(model=tiny(seed=1))]
options = {"batch_size": 8, "shard_bytes": 20_000}
wholes = [cached(model, rows, root / f"whole-{i}", **options) for i, model in enumerate(models)]
expected = [{p.name: p.read_bytes() for p in whole.folder.iterdir()} for whole in wholes]
folder = root / "raced"
WELL, REFUSED, WRONG = 0, 3, 4


def extract(which, pause, wait=0.0):
    """Extracts and reads; how it ended."""

    def slow(chosen):
        time.sleep(pause)
        return pad(chosen)

    time.sleep(wait)
    try:
        cache = cache_layer_states(models[which], rows, folder, slow, dtype="float32", progress=False, **options)
        states = cache.read(cache.find(rows))
    except (RuntimeError, StaleCacheError, FileNotFoundError) as error:
        told = str(error)
        clear = any(
            part in told
            for part in ("Another run is writing", "holds a cache of something else", "was deleted, or begun again")
        )
        if not clear:
            print(type(error).__name__, told, file=sys.stderr)
        return REFUSED if clear else WRONG
    right = wholes[which].read(wholes[which].find(rows))
    return WELL if torch.equal(states, right) else WRONG


def process(*arguments):
    child = os.fork()
    if not child:
        end = WRONG
        try:
            end = extract(*arguments)
        finally:
            os._exit(end)
    return child


def end_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def two_processes(other):
    children = [process(which, 0.005 * draw.random(), 0.02 * draw.random()) for which in (0, other)]
    return [end_of(child) for child in children]


def two_threads(other):
    ends = [WRONG, WRONG]

    def run(i, *arguments):
        ends[i] = extract(*arguments)

    pauses = [(0.005 * draw.random(), 0.02 * draw.random()) for _ in ends]
    threads = [threading.Thread(target=run, args=(i, which, *pauses[i])) for i, which in enumerate((0, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def deleted_under_it(other):
    child = process(0, 0.02)
    time.sleep(0.05 + 0.1 * draw.random())
    while folder.exists():  # the run may make a file while it is emptied
        shutil.rmtree(folder, ignore_errors=True)
    ends = [] if other is None else [extract(other, 0.0)]
    return [end_of(child), *ends]


WAYS = {
    "two processes, other weights": lambda: two_processes(1),
    "two processes, the same": lambda: two_processes(0),
    "two threads, other weights": lambda: two_threads(1),
    "two threads, the same": lambda: two_threads(0),
    "a folder deleted": lambda: deleted_under_it(None),
    "deleted and begun again": lambda: deleted_under_it(1),
}
wrong = 0
for name, way in WAYS.items():
    counts = Counter()
    for _ in range(times):
        shutil.rmtree(folder, ignore_errors=True)
        ends = way()
        counts.update(ends)
        if WELL in ends:  # whoever ended well, the folder is one whole cache
            there = {p.name: p.read_bytes() for p in folder.iterdir()}
            wrong += there not in expected
            LayerStateCache(folder, models[expected.index(there)] if there in expected else None)
        wrong += len([end for end in ends if end not in (WELL, REFUSED)])
    print(f"| {name} | {times} | {counts[WELL]} | {counts[REFUSED]} |")
print(f"wrong: {wrong}")
