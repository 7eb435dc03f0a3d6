"""Writes the adapters that later versions must still load: once before a release,

    PYTHONPATH=tests python tests/regression/make.py VERSION


Their backbones are not stored: they are random weights of a fixed seed, and the adapters' fingerprints tell if those change.
"""

import sys
from pathlib import Path

from families import answer, attach, first_head, inputs
from safetensors.torch import save_file
from support import disturb

HERE = Path(__file__).parent
CASES = {
    "dwatt-bert": ("bert", False, {}),
    "dwatt-lora-llama": ("llama", True, {"fusion_layers": [0, 2, -1]}),
    "concat-both-t5": ("t5-both", False, {"fusion": "concat", "fusion_bottleneck": 8}),
}

if __name__ == "__main__":
    for name, (family, lora, fields) in CASES.items():
        folder = HERE / sys.argv[1] / name
        model = disturb(attach(family, lora=lora, **fields))
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        save_file({"logits": answer(model, inputs(family, first_head(family))).contiguous()}, folder / "answer.safetensors")
