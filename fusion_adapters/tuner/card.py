"""What an adapter's model card says beyond what peft writes: how it is loaded, and where its parameters are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from pprint import pformat
from typing import Any, Protocol

import transformers
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ..backbone.blocks import LAYER_NAME

HEADING = "## How to load this adapter"
SECTION = """
{heading}

A layer fusion ({fusion} over {blocks}{lora}), a method that the package `fusion-adapters` adds to peft:

```python
import fusion_adapters  # registers the method; without it peft refuses the file
from peft import PeftModel
{backbone}
model = PeftModel.from_pretrained(backbone, "path/or/id/of/this/adapter")
```
"""
WEIGHTS = "adapter_model.safetensors"
MAPS = "fixed maps"  # of `fusion="shortcut"`
LABELLED = "Classification"  # in the names of classes whose outputs have labels
# Asked first, since others of transformers' auto classes list the same models.
USUAL = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText")


@dataclass(frozen=True)
class ModelClass:
    """The class of the model that an adapter was trained on, as a card names it.

    Attributes:
        module: Where it is imported from.
        name: Its name; where one of transformers' auto classes builds it, the name of that.
        loads: Whether it has `from_pretrained`.
        labels: The names of its outputs; empty if it is no classifier.
    """

    module: str
    name: str
    loads: bool
    labels: tuple[Any, ...]


class AdapterConfig(Protocol):
    """What the card reads of an adapter's config."""

    fusion: str
    fusion_num_layers: int | list[int] | None
    fusion_depth: int | float | None
    fusion_gguf: str | None
    r: int
    revision: str | None
    base_model_name_or_path: str | None
    model_class: ModelClass | None

    @property
    def has_lora(self) -> bool: ...  # noqa: D102


class CardWriter:
    """Writes the model card of one PeftModel by peft's own method, and adds how the adapter is loaded."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def __call__(self, output_dir: str) -> None:
        """Takes the place of the model's `create_or_update_model_card`."""
        type(self.model).create_or_update_model_card(self.model, output_dir)
        config: Any = self.model.active_peft_config
        # of an adapter that is being saved, the config comes after the weights, and adds the section with their sizes
        if (Path(output_dir) / WEIGHTS).is_file() or self.model.active_adapter != "default":
            add_loading_section(output_dir, config)


class CardKeeper:
    """Uploads the files of one PeftModel's `push_to_hub`, the card among them as a save writes it.

    transformers puts a card of its own over the one that was saved: that of the repository, or one without a word of the adapter.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def __call__(self, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        """Takes the place of the model's `_upload_modified_files`."""
        path = Path(working_dir) / "README.md"
        tags = set(ModelCard.load(path).data.tags or []) if path.is_file() else set()
        CardWriter(self.model)(working_dir)
        card = ModelCard.load(path)
        card.data.tags = sorted(tags | set(card.data.tags or []))  # peft keeps its own alone
        card.save(path)
        return type(self.model)._upload_modified_files(self.model, working_dir, *args, **kwargs)


def class_of(model: nn.Module) -> ModelClass:
    """The class of a model (a `PeftModel`: of what it wraps) and its labels, for the card."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base = getattr(base, "_orig_mod", base)  # in a compiled model
    # FSDP gives a model a class of its own, a child of the model's
    cls = next(c for c in type(base).__mro__ if not c.__module__.startswith("torch."))
    config = getattr(base, "config", None)
    names = getattr(config, "id2label", None) if LABELLED in cls.__name__ else None
    labels = tuple(names[i] for i in sorted(names)) if names else ()
    loads = issubclass(cls, PreTrainedModel)
    auto = auto_class(cls.__name__, getattr(config, "model_type", None)) if loads else None
    if auto is None and getattr(transformers, cls.__name__, None) is not cls:
        return ModelClass(cls.__module__, cls.__qualname__, loads, labels)
    return ModelClass("transformers", auto or cls.__name__, loads, labels)


def auto_class(name: str, model_type: Any) -> str | None:
    """The name of the auto class that builds the class of that name for that type of model; None if there is none."""
    mappings = {
        n: getattr(auto, "_model_mapping", None) for n, auto in vars(modeling_auto).items() if n.startswith("AutoModel")
    }
    for auto in (*USUAL, *mappings):
        known = getattr(mappings[auto], "_model_mapping", {})  # model type to name of a class
        if known.get(model_type) == name and auto != "AutoModelForPreTraining":
            return auto
    return None


def add_loading_section(folder: str | Path, config: AdapterConfig) -> None:
    """Adds to the README.md of a saved adapter how it is loaded and how many parameters each part has.

    Does nothing where there is no card, or where the card has the section.

    Args:
        folder: Where the adapter was saved; the counts come from its `adapter_model.safetensors`.
        config: The adapter's config.
    """
    card, weights = Path(folder) / "README.md", Path(folder) / WEIGHTS
    if not card.is_file() or HEADING in (text := card.read_text(encoding="utf-8")):
        return
    depth, ends = config.fusion_num_layers, config.fusion_depth
    section = SECTION.format(
        heading=HEADING,
        fusion=config.fusion,
        blocks=f"{depth[0]} encoder and {depth[1]} decoder blocks"
        if isinstance(depth, list)
        else f"{depth} blocks"
        if ends is None
        else f"the first {ends} blocks (a model that was cut to these does)",
        lora=f", with LoRA of rank {config.r}" if config.has_lora else "",
        backbone=_backbone_lines(config),
    )
    if weights.is_file():
        section += _table(count_parts(weights), weights.stat().st_size)
    card.write_text(text.rstrip() + "\n" + section, encoding="utf-8")


def _backbone_lines(config: AdapterConfig) -> str:
    """The lines of code that load the model of an adapter, its head included."""
    model, base = config.model_class, config.base_model_name_or_path
    if model is None or not model.loads:
        return f"\n# backbone: {base or 'the model it was trained on'}{f', a {model.name}' if model else ''}"
    arguments = [json.dumps(base or "path/or/id/of/the/backbone")]
    arguments += [f"revision={json.dumps(config.revision)}"] if config.revision else []
    if config.fusion_gguf is not None:  # a file's name, and its hash in brackets
        arguments.append(f"gguf_file={json.dumps(config.fusion_gguf.partition(' (')[0])}")
    lines = [f"from {model.module} import {model.name}", ""]
    if model.labels == tuple(f"LABEL_{i}" for i in range(len(model.labels))):  # nobody named them
        arguments += [f"num_labels={len(model.labels)}"] if model.labels else []
    else:
        lines.append(f"labels = {pformat(list(model.labels), width=100, compact=True)}")
        arguments += ["id2label=dict(enumerate(labels))", "label2id={label: i for i, label in enumerate(labels)}"]
    if model.labels:  # the base may have a head for other labels; the adapter brings its own
        arguments.append("ignore_mismatched_sizes=True")
    call = f"backbone = {model.name}.from_pretrained("
    if len(arguments) < 3:
        return "\n".join([*lines, f"{call}{', '.join(arguments)})"])
    return "\n".join([*lines, call, *(f"    {argument}," for argument in arguments), ")"])


def count_parts(weights: Path) -> dict[str, int]:
    """The number of values in an adapter's file by part: fusion, LoRA, the rest, which is the head, and maps that never train."""
    counts = {"fusion": 0, "LoRA": 0, "head": 0}
    with safe_open(weights, "np") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            part = "fusion" if f"{LAYER_NAME}." in name else "LoRA" if "lora_" in name else "head"
            if part == "fusion" and ".map_" in name:
                part = MAPS
            counts[part] = counts.get(part, 0) + prod(file.get_slice(name).get_shape())
    return counts


def _table(counts: dict[str, int], size: int) -> str:
    rows = [f"| {part} | {count:,} |" for part, count in counts.items() if count]
    return "\n".join(["", "| part | parameters |", "| --- | --- |", *rows, f"| file | {size:,} bytes |", ""])
