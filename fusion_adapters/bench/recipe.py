"""What the YAML file of a benchmark may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..runs.recipe import BackboneRecipe
from ..runs.yaml import apply_settings, read_yaml, validated
from ..tasks.data import DataRecipe


class BenchRecipe(BaseModel):
    """A benchmark on token classification. The defaults need neither hub nor data folder."""

    model_config = ConfigDict(extra="forbid")

    backbone: BackboneRecipe = BackboneRecipe.model_validate({"model": "sentence-transformers/all-MiniLM-L6-v2"})
    data: DataRecipe = DataRecipe.model_validate({"path": "package:quickstart", "train": "train.conll"})
    examples: int = Field(512, ge=8, description="Training examples of an epoch, the first of the file.")
    batch_size: int = Field(32, ge=1, description="Examples per step.")
    repeats: int = Field(5, ge=1, description="Timed rounds, after one that is not counted.")
    lora: dict[str, Any] = Field(
        default={"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}, description="Fields of LoraConfig."
    )
    depths: list[int] = Field(min_length=2, default=[6, 12, 24, 48], description="Numbers of layers of the scaling part.")
    widths: list[int] = Field(default=[128, 256, 512, 1024], description="Hidden sizes of the scaling part.")
    lengths: list[int] = Field(
        default=[32, 128, 512, 2048], description="Sequence lengths of the scaling part, 4 rows each."
    )
    tokens: list[int] = Field(min_length=2, default=[512, 1024, 2048, 4096, 8192], description="Tokens of the scaling part.")
    large: dict[str, Any] = Field(
        default={
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
        description="LlamaConfig of the case that needs a GPU: random weights, sequences of large_length.",
    )
    large_length: int = Field(1024, ge=8, description="Positions of a sequence in that case.")


QUICK: dict[str, Any] = {
    "examples": 96,
    "repeats": 2,
    "depths": [6, 12, 24],
    "widths": [128, 256, 512],
    "lengths": [32, 128, 512],
    "tokens": [512, 1024, 2048],
}


def load_bench(path: str | Path | None = None, settings: list[str] | None = None, quick: bool = False) -> BenchRecipe:
    """Reads and checks the recipe of a benchmark.

    Args:
        path: The YAML file; None takes the defaults.
        settings: Changes, `key=value`, the value in YAML.
        quick: Fewer examples, rounds and sizes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a key or a value does not fit.
    """
    values = {} if path is None else read_yaml(path)
    if quick:
        values = {**values, **QUICK}
    apply_settings(values, settings)
    return validated(BenchRecipe, values, str(path or "defaults"))
