"""One extraction of layer states for test_distributed.py, started by accelerate. Usage: ... extract_run.py FOLDER"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from support import attached
from support_cache import pad, some_rows
from support_distributed import end_process

from fusion_adapters.states import cache_layer_states

torch.set_num_threads(1)
state = PartialState(cpu=True)
cache = cache_layer_states(
    attached(), some_rows(40), sys.argv[1], pad, dtype="float32", batch_size=4, shard_bytes=20_000, progress=False
)
assert len(cache) == 40
(Path(sys.argv[1]).parent / f"process-{state.process_index}-of-{state.num_processes}").write_text("")
end_process()
