"""The benchmark: speed, memory and checkpoint size of fusions, live and cached, against LoRA on the machine at hand."""

from .recipe import BenchRecipe, load_bench
from .runner import run_bench

__all__ = ["BenchRecipe", "load_bench", "run_bench"]
