"""The case for a GPU: LoRA on all linear layers against a fusion of the same size, on a large decoder with random weights."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ..backbone.quantization import quantization_config
from ..tuner.config import FusionConfig
from ..tuner.counts import count_trainable
from .recipe import BenchRecipe

RANK = 16
WARM_UP, STEPS = 2, 5
LARGEST_BATCH = 256
MEASURED = ("parameters", "tokens_per_second", "peak_gib", "largest_batch")


def measure_large(recipe: BenchRecipe, advance: Callable[[str], None], device: str = "cuda") -> list[dict[str, Any]]:
    """Tokens per second, peak memory and largest batch of both methods, with bf16 and with 8-bit weights.

    Args:
        recipe: The shape of the model, and the length of a sequence.
        advance: Called with what is done next.
        device: Where; `"cpu"` only for trying it with a small shape.

    Returns:
        A row for each method and precision: `parameters`, `tokens_per_second`, `peak_gib` (both at batch 1), and
        `largest_batch`, the largest power of two that trains without running out of memory. All None if not even a batch
        of one fits into the GPU.
    """
    rows = []
    precisions = ["bf16"]
    if importlib.util.find_spec("bitsandbytes") is not None:
        precisions.append("8-bit")
    for precision in precisions:
        for method in ("LoRA", "DWAtt"):
            advance(f"large, {method}, {precision}")
            row: dict[str, Any] = {"method": method, "precision": precision, **dict.fromkeys(MEASURED)}
            with contextlib.suppress(torch.OutOfMemoryError):  # the row then says so, and what was measured before it stays
                row |= _measure_case(recipe, method, precision, device)
            rows.append(row)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return rows


def _measure_case(recipe: BenchRecipe, method: str, precision: str, device: str) -> dict[str, Any]:
    model = _attach(_model(recipe, precision, device), method)
    return {"parameters": count_trainable(model)["total"], **_measure(model, recipe, device)}


def _model(recipe: BenchRecipe, precision: str, device: str) -> nn.Module:
    config = LlamaConfig(**recipe.large, use_cache=False)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if precision == "8-bit":  # the way of every 8-bit model: from a checkpoint
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            where = {"": 0 if device == "cuda" else device}
            model = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization_config(8), device_map=where)
    return model


def _attach(model: nn.Module, method: str) -> Any:
    lora = {"r": RANK, "target_modules": "all-linear"}
    if method == "LoRA":
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))  # type: ignore[arg-type]
    with torch.device("meta"):
        empty = LlamaForCausalLM(model.config)  # type: ignore[arg-type]
        budget = count_trainable(get_peft_model(empty, LoraConfig(task_type="CAUSAL_LM", **lora)))["lora"]  # type: ignore[arg-type]
    return get_peft_model(model, FusionConfig(task_type="CAUSAL_LM", fusion_budget=budget))  # type: ignore[arg-type]


def _measure(model: Any, recipe: BenchRecipe, device: str) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    vocabulary = model.config.vocab_size
    model.train()

    def step(batch: int) -> None:
        ids = torch.randint(vocabulary, (batch, recipe.large_length), device=device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM_UP):
        step(1)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait()
    begun = time.perf_counter()
    for _ in range(STEPS):
        step(1)
    wait()
    seconds = time.perf_counter() - begun
    result = {"tokens_per_second": STEPS * recipe.large_length / seconds, "peak_gib": None, "largest_batch": None}
    if device != "cuda":
        return result
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    largest, batch = 1, 2
    while batch <= LARGEST_BATCH:
        try:
            step(batch)
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            break
        largest, batch = batch, 2 * batch
    return {**result, "largest_batch": largest}
