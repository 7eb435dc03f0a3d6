"""Whether a saved adapter is whole and fits: all that can be told, with every problem, before anybody loads it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from transformers import GgufConfig

from ..backbone.decoders import mark_gguf, settle_gguf
from ..tuner import FusionConfig
from ..tuner.card import LABELLED
from ..tuner.counts import skeleton
from ..tuner.digest import check_options
from ..tuner.verify import (
    WEIGHTS,
    check_backbone,
    check_values,
    config_problems,
    expected_tensors,
    fusion_differences,
    labels_of,
    model_class,
    own_tensors,
    weights_file,
)
from ..tuner.weights import read_weights, tensor_differences
from .contents import contents
from .pretrained import load_pretrained, locate, path_of_gguf
from .recipe import BackboneRecipe

T = TypeVar("T")
UNREADABLE = (ValueError, OSError, ImportError, TypeError, AttributeError, KeyError)  # whatever a damaged value meets first
OLD = (
    "The adapter holds no digest of its weights and options, as none did before version 0.2 (or somebody took it out): of changed values "
    "only NaN and infinity are seen. Load it once with its backbone and save it again to add one."
)


@dataclass
class Verdict:
    """What `verify` found.

    Attributes:
        adapter: The adapter's folder.
        problems: What is wrong, a paragraph each; empty if nothing is.
        checked: What was looked at and is right.
        unchecked: What could not be looked at, and why.
        notes: What is no problem and worth knowing.
        inside: What the adapter is, see `contents`.
    """

    adapter: str
    problems: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inside: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """All of it, and `ok`."""
        return {"ok": not self.problems, **asdict(self)}

    def attempt(self, what: str | None, check: Callable[[], T]) -> T | None:
        """Notes that something is right, or what is wrong with it; returns what the check does, None where it fails."""
        try:
            found = check()
        except UNREADABLE as error:
            self.wrong(" ".join(str(error).split()) or type(error).__name__)
            return None
        if what is not None:
            self.checked.append(what)
        return found

    def wrong(self, problem: str) -> None:
        """Notes a problem, once."""
        if problem not in self.problems:
            self.problems.append(problem)


def verify(folder: str | Path, backbone: str | None = None) -> Verdict:
    """Looks through a saved adapter: files, digest, tensors, labels, and its backbone.

    Args:
        folder: A run's folder, or an adapter's.
        backbone: The model that it is to be loaded on, a hub id or a folder: it is loaded, and the adapter on it. None: what needs its
            weights is left out, and its configuration is read where it can be had.

    Raises:
        OSError: If the backbone that was given cannot be loaded.
    """
    given = Path(folder)
    adapter = given if (given / CONFIG_NAME).is_file() or not (given / "adapter").is_dir() else given / "adapter"
    verdict = Verdict(str(adapter))
    if not (adapter / CONFIG_NAME).is_file():
        there = ", ".join(sorted(p.name for p in given.iterdir())[:12]) if given.is_dir() else "it is no folder"
        verdict.wrong(
            f"There is no adapter in {str(given)!r}: neither {CONFIG_NAME} nor adapter/{CONFIG_NAME} (found: {there or 'nothing'}). Give "
            "the folder that save_pretrained wrote, or that was --output of fusion-adapters train."
        )
        return verdict
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        _look(verdict, adapter, backbone)
    texts = [" ".join(str(w.message).split()) for w in told if w.category is UserWarning]
    verdict.notes += dict.fromkeys(text for text in texts if "holds no digest" not in text)
    return verdict


def _look(verdict: Verdict, adapter: Path, backbone: str | None) -> None:
    wrong = config_problems(adapter)
    verdict.problems += wrong
    config = None if wrong else verdict.attempt(f"{CONFIG_NAME}: readable", lambda: FusionConfig.from_pretrained(adapter))
    weights = _weights(verdict, adapter)
    run = _run_of(verdict, adapter)
    if config is not None:
        verdict.inside = contents(config, adapter, run)
        if config.fusion_digest is None:
            verdict.unchecked.append("options and weights against a digest: there is none")
            verdict.notes.append(OLD)
        else:
            verdict.attempt("options: those that were saved", lambda: check_options(config, (str(adapter), {})))
        if run is not None and config.fusion_labels not in (None, run["labels"]):
            verdict.wrong(
                f"run.json names the outputs {run['labels']} and {CONFIG_NAME} {config.fusion_labels} (fusion_labels): one of the two "
                "comes from another run. Restore it."
            )
    if config is None or weights is None:
        verdict.unchecked.append("tensors and backbone: the adapter cannot be read")
        return
    if not config.bound:
        verdict.wrong(
            f"{CONFIG_NAME} names no backbone (fusion_num_layers): it was saved alone, not with an adapter, or the field was taken out."
        )
        return
    _check_tensors(verdict, adapter, config, weights, backbone, run)


def _weights(verdict: Verdict, adapter: Path) -> dict[str, Tensor] | None:
    file = weights_file(adapter)
    if file is None:
        verdict.wrong(f"There are no weights in {str(adapter)!r}: neither {' nor '.join(WEIGHTS)}. Copy the folder again.")
        return None
    return verdict.attempt(f"{file.name}: readable", lambda: read_weights((str(adapter), {})))


def _run_of(verdict: Verdict, adapter: Path) -> dict[str, Any] | None:
    """Recipe, labels and metrics of the run in whose folder an adapter lies; None if there is none."""
    found = {}
    for name in ("run", "metrics"):
        file = adapter.parent / f"{name}.json"
        if adapter.name != "adapter" or not file.is_file():
            return None
        try:
            found[name] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            verdict.wrong(f"{str(file)!r} is damaged ({error}). Restore it, or train again.")
            return None
    size = found["metrics"].get("bytes", {}).get(WEIGHTS[0])
    if size is not None and (adapter / WEIGHTS[0]).is_file() and size != (adapter / WEIGHTS[0]).stat().st_size:
        verdict.wrong(
            f"{WEIGHTS[0]} has {(adapter / WEIGHTS[0]).stat().st_size:,} bytes, and had {size:,} when the run was written "
            "(metrics.json). Copy it again."
        )
    return {**found["run"], "metrics": found["metrics"]}


def _check_tensors(
    verdict: Verdict,
    adapter: Path,
    config: FusionConfig,
    weights: dict[str, Tensor],
    backbone: str | None,
    run: dict[str, Any] | None,
) -> None:
    recipe = _backbone_recipe(config, backbone, run)
    model_type = model_class(config)
    empty = options = None
    if recipe is None:
        verdict.unchecked.append("head, LoRA and backbone: the adapter names no backbone. Give one: --backbone")
    elif model_type is None:
        kind = (config.auto_mapping or {}).get("base_model_class", "unknown")
        verdict.unchecked.append(f"head and LoRA: the model's class ({kind}) is none of transformers'")
    else:
        empty, options = _empty(verdict, config, weights, recipe, model_type)
    expected = None
    if empty is not None:
        expected = verdict.attempt(
            "backbone: type, width and depth, by its configuration", lambda: expected_tensors(config, empty)
        )
    own = own_tensors(weights, empty if expected is not None else None, expected or {})
    if expected is not None:
        differences, what = tensor_differences(expected, own), f"{len(own)} tensors: names, shapes and dtypes"
    elif config.options.get("copy_last"):
        differences, what = [], None
        verdict.unchecked.append("tensors: the fusion is a copy of a block of the backbone (fusion_copy_last)")
    else:
        told = verdict.attempt(None, lambda: fusion_differences(config, own))
        differences = told or []
        what = None if told is None else "tensors of the fusion: names, shapes and dtypes, by the sizes in its config"
    for difference in differences:
        verdict.wrong(f"The tensors are not those of the config: {difference}.")
    if what is not None and not differences:
        verdict.checked.append(what)
    digest = verdict.attempt("weights: those that were saved, or finite", lambda: check_values(config, adapter, own))
    if digest is not None:
        verdict.checked[-1] = "weights: those that were saved (digest)" if digest else "weights: finite"
    if backbone is None or recipe is None:
        verdict.unchecked.append(
            "the backbone's weights against the fingerprint: needs the backbone, fusion-adapters verify DIR --backbone "
            f"{config.base_model_name_or_path or 'MODEL'}"
        )
        return
    _check_on(verdict, adapter, config, _loaded(recipe, model_type, options or {}))


def _backbone_recipe(config: FusionConfig, backbone: str | None, run: dict[str, Any] | None) -> BackboneRecipe | None:
    """Which model the adapter belongs on: that of its run, or of its config, unless another is given."""
    trained = {"model": config.base_model_name_or_path, "revision": config.revision}
    if run is not None:
        trained = {k: v for k, v in run["recipe"]["backbone"].items() if k in BackboneRecipe.model_fields and k != "bits"}
    elif config.fusion_gguf is not None:
        file = config.fusion_gguf.partition(" (")[0]  # its hash in brackets
        trained["gguf_file"] = file if (Path(trained["model"] or "") / file).is_file() else None
    if backbone is not None and backbone != trained["model"]:
        trained = {"model": backbone}
    return BackboneRecipe.model_validate(trained) if trained["model"] else None


def _empty(
    verdict: Verdict, config: FusionConfig, weights: dict[str, Tensor], recipe: BackboneRecipe, cls: Any
) -> tuple[nn.Module | None, dict[str, Any] | None]:
    """The model of an adapter without values, and what it was told of its outputs; notes why there is none."""
    name, where = locate(recipe)

    def build(options: dict[str, Any]) -> nn.Module:
        return skeleton(name, cls, **where, **options)

    try:
        empty = build({})
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:240]
        verdict.unchecked.append(f"head and LoRA: the configuration of {recipe.model!r} cannot be had here ({reason})")
        return None, None
    if LABELLED not in cls.__name__:
        return empty, {}
    options = verdict.attempt(None, lambda: labels_of(config, weights, build))
    return (None, None) if options is None else (build(options), options)


def _loaded(recipe: BackboneRecipe, cls: Any, options: dict[str, Any]) -> nn.Module:
    """The model with its weights, in the checkpoint's own dtype."""
    from transformers import AutoModel

    gguf = "gguf_file" in locate(recipe)[1]
    more: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)} if gguf else {"dtype": "auto"}
    model = load_pretrained(cls or AutoModel, recipe, ignore_mismatched_sizes=True, **more, **options)
    if gguf:
        settle_gguf(model)
        mark_gguf(model, path_of_gguf(recipe))
    return model


def _check_on(verdict: Verdict, adapter: Path, config: FusionConfig, model: nn.Module) -> None:
    known = verdict.attempt("backbone: its weights, by the fingerprint", lambda: check_backbone(config, model))
    if known is False:
        verdict.checked[-1] = "backbone: type, width and depth"
        verdict.unchecked.append("the backbone's weights: the adapter holds no fingerprint of them")
    if verdict.problems:
        verdict.unchecked.append("loading: problems were found before")
        return
    verdict.attempt("loading: PeftModel.from_pretrained takes it", lambda: PeftModel.from_pretrained(model, adapter))
