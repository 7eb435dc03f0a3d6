"""The benchmark: speed, memory and checkpoint size of fusions, live and cached, against LoRA on the machine at hand."""

from .runner import run_bench
from .settings import BenchRecipe, load_bench

__all__ = ["BenchRecipe", "load_bench", "run_bench"]
