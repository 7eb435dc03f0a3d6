"""What a saved adapter is, from its own files and those of its run, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from ..tuner import FusionConfig
from ..tuner.card import count_parts
from ..tuner.verify import weights_file


def contents(config: FusionConfig, adapter: Path, run: dict[str, Any] | None) -> dict[str, Any]:
    """Method, backbone, LoRA, labels, parameters, scores and versions of a saved adapter, as JSON holds them.

    Args:
        config: Its config.
        adapter: Its folder.
        run: Its run: recipe, labels and metrics; None if only the adapter is at hand.
    """
    metrics = {} if run is None else run["metrics"]
    lora = {name: getattr(config, name) for name in ("r", "lora_alpha", "target_modules")} if config.has_lora else None
    if lora is not None and isinstance(lora["target_modules"], (set, frozenset)):
        lora["target_modules"] = sorted(lora["target_modules"])
    file = weights_file(adapter)
    labels = config.fusion_labels or (run["labels"] if run is not None else None)
    return {
        "method": config.fusion,
        "options": {**config.options, "norm": config.fusion_norm, "alpha": config.alpha},
        "task": getattr(config.task_type, "value", config.task_type) if run is None else run["recipe"]["task"],
        "layers": config.fusion_layers,
        "depth": config.fusion_depth,
        "pool": config.fusion_pool,
        "stack": config.fusion_stack,
        "lora": lora,
        "backbone": {
            "name": config.base_model_name_or_path,
            "revision": config.revision,
            "gguf": config.fusion_gguf,
            "type": config.fusion_model_type,
            "hidden_size": config.fusion_hidden_size,
            "blocks": config.fusion_num_layers,
            "fingerprint": short_fingerprint(config.fusion_fingerprint),
        },
        "budget": None if run is None else run["recipe"]["adapter"].get("fusion_budget"),
        "parameters": _counts(file),
        "bytes": None if file is None else file.stat().st_size,
        "labels": labels or None,
        "scores": metrics.get("scores") or _scores_of_card(adapter / "README.md"),
        "intervals": metrics.get("intervals"),
        "versions": metrics.get("versions") or {"peft": getattr(config, "peft_version", None)},
    }


def short_fingerprint(fingerprint: str | None) -> str | None:
    """A fingerprint of a backbone short enough to be compared by eye: its version, and a hash of it."""
    if fingerprint is None:
        return None
    return f"{fingerprint.partition(':')[0]}:{xxhash.xxh3_64(fingerprint.encode()).hexdigest()}"


def _counts(file: Path | None) -> dict[str, int] | None:
    """Parameters by part, and their sum; None where the file cannot be read."""
    if file is None or file.suffix != ".safetensors":
        return None
    try:
        counts = {part.lower(): count for part, count in count_parts(file).items()}
        with safe_open(file, "np") as opened:
            dtypes = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError):
        return None
    return {**counts, "total": sum(counts.values()), "dtypes": sorted(dtypes)}  # type: ignore[dict-item]


def _scores_of_card(card: Path) -> dict[str, dict[str, float]] | None:
    """Scores by split, from the metadata of a model card."""
    if not card.is_file():
        return None
    try:
        results = ModelCard.load(card).data.eval_results or []
    except Exception:  # YAML of any kind, written by anybody
        return None
    scores: dict[str, dict[str, float]] = {}
    for result in results:
        scores.setdefault(result.dataset_split or "test", {})[result.metric_type] = result.metric_value
    return scores or None
