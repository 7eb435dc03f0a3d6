"""FSDP2 on two CPU processes for test_distributed.py: blocks, fusion and model sharded by torch's own fully_shard.

Usage: torchrun --nproc_per_node 2 fsdp_run.py OUTPUT CASE... (one process: nothing is sharded)
A case is FAMILY-LORA, and the name of its folder in OUTPUT.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from families import attach, inputs
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from support import disturb, without_dropout
from support_distributed import end_process
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fusion_adapters.tuner import fusion_layers

torch.set_num_threads(1)
world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
mesh = None
if world > 1:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world,))


def train(output, family, lora):
    """Trains, and writes history and adapter into a folder."""
    model = without_dropout(disturb(attach(family, "sequence", lora == "lora", fusion_alpha=1.0)))
    if mesh is not None:
        for layer in fusion_layers(model):
            for block in layer.backbone.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    rows = [inputs(family, "sequence", seed=seed) for seed in range(8)]  # each of two
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    model.train()
    for batch in rows * 2:
        mine = {k: v[rank : rank + 1] if world > 1 else v for k, v in batch.items()}
        loss = model(**mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
    tensors = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in get_peft_model_state_dict(model).items()}
    if rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        (output / "history.json").write_text(json.dumps({"losses": losses, "shards": world}))
        save_file({k: v.contiguous() for k, v in tensors.items()}, output / "adapter_model.safetensors")


for case in sys.argv[2:]:
    train(Path(sys.argv[1]) / case, *case.split("-"))
end_process()
