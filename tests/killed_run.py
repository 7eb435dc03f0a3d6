"""Kills extractions at many moments and goes on with them, for states/test_claim.py. Usage: ... killed_run.py FOLDER TIMES"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from support import attached
from support_cache import cached, some_rows

torch.set_num_threads(1)
root, times = Path(sys.argv[1]), int(sys.argv[2])
model, rows = attached(), some_rows(200)
options = {"batch_size": 8, "shard_bytes": 20_000}
started = time.time()
cached(model, rows, root / "whole", **options)
took = time.time() - started
expected = {p.name: p.read_bytes() for p in (root / "whole").iterdir()}
resumed = left = 0
for i in range(times):
    folder = root / f"killed-{i}"
    process = os.fork()
    if not process:
        try:
            cached(model, rows, folder, **options)
        finally:
            os._exit(0)
    while not folder.exists():
        pass
    time.sleep(0.8 * took * i / times)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    left += any(p.name.startswith(".") for p in folder.iterdir())
    cached(model, rows, folder, **options)
    resumed += {p.name: p.read_bytes() for p in folder.iterdir()} == expected
print(f"{resumed} of {times} resumed; files of the dead run were there: {left}")
