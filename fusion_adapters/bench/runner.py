"""Runs all parts of the benchmark, compares them with the bars, and writes the report."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from tqdm.auto import tqdm

from ..runs.environment import cores, denormals_flushed
from ..runs.files import check_output, written_aside
from ..tuner.config import FusionConfig
from ..tuner.counts import count_trainable
from .cases import EXTRACTIONS, FORWARDS, SHARE, epoch_cases
from .large import measure_large
from .recipe import BenchRecipe
from .report import write_bench_report
from .rounds import Setting
from .scaling import exponents, measure_scaling
from .workers import DEEP_CASES, MEMORY_CASES, alternate, deep_inference_memory, peak_memory

LOAD_PARAMETERS = 10_000_000


@denormals_flushed()
def run_bench(recipe: BenchRecipe, output: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Measures speed, memory and sizes on the machine at hand.

    Args:
        recipe: What to measure.
        output: Folder for `results.csv`, `summary.json`, `summary.md` and figures; it appears when all is done.
        overwrite: Replace an earlier benchmark in that folder.

    Returns:
        The content of `summary.json`.

    Raises:
        ChildProcessError: If a case fails.
        OSError: If data, model or folder cannot be read or written.
    """
    output = check_output(output, overwrite, "bench")
    bar = tqdm(desc="benchmark", unit="measurement")

    def advance(what: str) -> None:
        bar.set_postfix_str(what)
        bar.update()

    with written_aside(output, overwrite, "bench") as folder, tempfile.TemporaryDirectory(dir=folder) as scratch, bar:
        transformers.utils.logging.disable_progress_bar()  # "Loading weights", within ours
        setting = Setting(recipe, Path(scratch))
        model = setting.bare()
        epochs = epoch_cases(model)
        rounds = len([*epochs, *FORWARDS, *EXTRACTIONS]) * (recipe.repeats + 1)
        bar.total = rounds + 2 * len(MEMORY_CASES) + len(DEEP_CASES) + 4 + 1
        setting.cache(model)
        backbone_parameters = _without_embeddings(model)
        del model
        seconds = {
            **alternate(recipe, epochs, Path(scratch), advance),
            **alternate(recipe, list(FORWARDS), Path(scratch), advance),
            **alternate(recipe, list(EXTRACTIONS), Path(scratch), advance),
        }
        memory = peak_memory(recipe, Path(scratch), advance)
        deep_memory = deep_inference_memory(recipe, advance)
        scaling = measure_scaling(recipe, advance)
        advance("checkpoints")
        checkpoints = measure_checkpoints(setting, Path(scratch))
        large = measure_large(recipe, advance) if torch.cuda.is_available() else []
        summary = {
            "machine": describe_machine(),
            "recipe": recipe.model_dump(),
            "examples": setting.examples,
            "tokens_per_epoch": setting.tokens,
            "seconds": {case: {"median": statistics.median(s), "rounds": s} for case, s in seconds.items()},
            "memory_mib": memory,
            "deep_inference_mib": deep_memory,
            "scaling": scaling,
            "exponents": exponents(scaling),
            "checkpoints": checkpoints,
            "flop_share": checkpoints["DWAtt"]["parameters"] / backbone_parameters,
            "large": large,
        }
        summary["bars"] = compare_with_bars(summary)
        write_bench_report(summary, folder)
    return summary


def ratio(seconds: dict[str, Any], first: str, second: str) -> float:
    """The median over rounds of the ratio of two cases, both of the same round."""
    pairs = zip(seconds[first]["rounds"], seconds[second]["rounds"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def compare_with_bars(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar with what was measured: `bar`, `value`, `asked` (in words) and `holds`."""
    seconds, memory = summary["seconds"], summary["memory_mib"]
    first_epoch = statistics.median(
        (e + c) / lora
        for e, c, lora in zip(
            seconds["extraction"]["rounds"], seconds["DWAtt, cached"]["rounds"], seconds["LoRA"]["rounds"], strict=True
        )
    )
    overhead = ratio(seconds, "DWAtt attached", "bare model") - 1
    load = summary["checkpoints"][f"DWAtt, {LOAD_PARAMETERS // 10**6} M"]
    extra = max(c["bytes"] - 4 * c["parameters"] for c in summary["checkpoints"].values())
    measured: list[tuple[str, float, str, bool]] = []

    def bar(name: str, value: float, asked: str, holds: bool) -> None:
        measured.append((name, value, asked, holds))

    value = ratio(seconds, "LoRA", "DWAtt, cached")
    bar("LoRA epoch / cached DWAtt epoch", value, "at least 20", value >= 20)
    value = ratio(seconds, "LoRA", "DWAtt 20 %, cached")
    bar("LoRA epoch / cached DWAtt epoch at 20 % of the budget", value, "at least 50", value >= 50)
    value = ratio(seconds, "LoRA", "Concat 20 %, cached")
    bar("LoRA epoch / cached Concat epoch at 20 % of the budget", value, "at least 50", value >= 50)
    for name in ("DWAtt", "DWAtt 20 %"):
        if f"{name}, loop in memory" in seconds:
            value = ratio(seconds, f"{name}, cached", f"{name}, loop in memory")
            bar(f"cached {name} epoch / bare loop in memory", value, "at most 1.5", value <= 1.5)
    bar("first epoch with extraction / LoRA epoch", first_epoch, "below 1", first_epoch < 1)
    value = ratio(seconds, "extraction", "bare forward")
    bar("extraction / bare forward of the same batches", value, "at most 1.05", value <= 1.05)
    value = ratio(seconds, "last attached", "bare model")
    bar("forward with an attached last / bare model", value, "at most 1.02", value <= 1.02)
    value = overhead / summary["flop_share"]
    bar("added forward time of DWAtt / its share of FLOPs", value, "at most 1.15", value <= 1.15)
    value = ratio(seconds, "Concat 20 % on 40 % of the blocks", "bare model")
    bar("forward of Concat on 40 % of the blocks / bare model", value, "at most 0.5", value <= 0.5)
    value = memory["DWAtt, live"]["training"] / memory["DWAtt, live"]["inference"]
    bar("memory of a live DWAtt training step / inference", value, "at most 1.3", value <= 1.3)
    value = memory["DWAtt, live"]["training"] / memory["LoRA"]["training"]
    bar("memory of a live DWAtt training step / LoRA's", value, "at most 0.333", value <= 1 / 3)
    bar("checkpoint bytes beyond 4 a parameter", extra, "at most 16,384", extra <= 16384)
    value = load["load_seconds"]
    bar("seconds to load 10 M parameters", value, "below 0.5", value < 0.5)
    for axis in ("depth", "tokens"):
        value = summary["exponents"][axis]
        bar(f"exponent of the time in {axis}", value, "0.9 to 1.1", 0.9 <= value <= 1.1)
    return [{"bar": n, "value": v, "asked": a, "holds": h} for n, v, a, h in measured]


def measure_checkpoints(setting: Setting, folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes of the saved tensors' file and seconds to load the adapter onto a loaded backbone."""
    from peft import get_peft_model

    found: dict[str, dict[str, Any]] = {}
    fields: dict[str, dict[str, Any]] = {
        "DWAtt": {"fusion_budget": setting.budget(1)},
        "DWAtt 20 %": {"fusion_budget": setting.budget(SHARE)},
        f"DWAtt, {LOAD_PARAMETERS // 10**6} M": {"fusion_budget": LOAD_PARAMETERS},
    }
    for name, field in fields.items():
        model: Any = get_peft_model(setting.bare(), FusionConfig(task_type="TOKEN_CLS", **field))  # type: ignore[arg-type]
        target = folder / f"adapter-{len(found)}"
        model.save_pretrained(str(target), save_embedding_layers=False)
        taken = []
        for _ in range(3):
            backbone: Any = setting.bare()
            begun = time.perf_counter()
            PeftModel.from_pretrained(backbone, str(target))
            taken.append(time.perf_counter() - begun)
        counts = count_trainable(model)
        found[name] = {
            "parameters": counts["total"],
            "fusion_parameters": counts["fusion"],
            "bytes": (target / "adapter_model.safetensors").stat().st_size,
            "load_seconds": statistics.median(taken),
        }
    return found


def describe_machine() -> dict[str, Any]:
    """Processor, GPU and versions."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def _without_embeddings(model: Any) -> int:
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
