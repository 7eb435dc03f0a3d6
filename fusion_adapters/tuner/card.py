"""What an adapter's model card says beyond what peft writes: how it is loaded, and where its parameters are."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from ..backbone.blocks import LAYER_NAME

if TYPE_CHECKING:
    from .config import FusionConfig

HEADING = "## How to load this adapter"
SECTION = """
{heading}

A layer fusion ({fusion} over {blocks}{lora}), a method that the package `fusion-adapters` adds to peft:

```python
import fusion_adapters  # registers the method; without it peft refuses the file
from peft import PeftModel

model = PeftModel.from_pretrained(backbone, "path/or/id/of/this/adapter")  # backbone: {base}
```
"""


def add_loading_section(folder: str | Path, config: FusionConfig) -> None:
    """Adds to the README.md of a saved adapter how it is loaded and how many parameters each part has.

    Does nothing where there is no card, or where the card has the section.

    Args:
        folder: Where the adapter was saved; the counts come from its `adapter_model.safetensors`.
        config: The adapter's config.
    """
    card, weights = Path(folder) / "README.md", Path(folder) / "adapter_model.safetensors"
    if not card.is_file() or HEADING in (text := card.read_text(encoding="utf-8")):
        return
    depth = config.fusion_num_layers
    section = SECTION.format(
        heading=HEADING,
        fusion=config.fusion,
        blocks=f"{depth[0]} encoder and {depth[1]} decoder blocks" if isinstance(depth, list) else f"{depth} blocks",
        lora=f", with LoRA of rank {config.r}" if config.has_lora else "",
        base=config.base_model_name_or_path or "the model it was trained on",
    )
    if weights.is_file():
        section += _table(count_parts(weights), weights.stat().st_size)
    card.write_text(text.rstrip() + "\n" + section, encoding="utf-8")


def count_parts(weights: Path) -> dict[str, int]:
    """The number of values in an adapter's file by part: fusion, LoRA, and the rest, which is the head."""
    counts = {"fusion": 0, "LoRA": 0, "head": 0}
    with safe_open(weights, "np") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            part = "fusion" if f"{LAYER_NAME}." in name else "LoRA" if "lora_" in name else "head"
            counts[part] += prod(file.get_slice(name).get_shape())
    return counts


def _table(counts: dict[str, int], size: int) -> str:
    rows = [f"| {part} | {count:,} |" for part, count in counts.items() if count]
    return "\n".join(["", "| part | parameters |", "| --- | --- |", *rows, f"| file | {size:,} bytes |", ""])
