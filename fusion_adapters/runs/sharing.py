"""The models of several runs on one backbone, which is loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from ..backbone.share import share_backbone, stand_on, twin
from ..backbone.walk import parameters_of
from ..tuner import TASK_HEADS
from .loading import load_lower
from .predicting import read_run
from .recipe import BackboneRecipe, Recipe
from .tokenizers import load_tokenizer

_RANKS = {"CAUSAL_LM": 0, "SEQ_CLS": 1, "TOKEN_CLS": 2}  # by peft's task types


@dataclass(frozen=True)
class Described:
    """A run as its folder describes it.

    Attributes:
        folder: The folder.
        recipe: Its recipe.
        labels: Its labels, in the order of the model's outputs.
        depth: The blocks that its adapter reads; None for all.
    """

    folder: Path
    recipe: Recipe
    labels: list[str]
    depth: int | None

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of the modules that its adapter brings: the task's head and `modules_to_save`."""
        return (*TASK_HEADS.get(self.recipe.task.peft_type or "", ()), *(self.recipe.adapter.get("modules_to_save") or ()))


def describe(folder: str | Path) -> Described:
    """Reads what a run's folder says of it.

    Raises:
        OSError: If the folder holds no run.
        ValueError: If its description, or that of its adapter, is damaged.
    """
    recipe, labels = read_run(folder)
    config: Any = PeftConfig.from_pretrained(str(Path(folder) / "adapter"))
    return Described(Path(folder), recipe, labels, getattr(config, "fusion_depth", None))


class SharedBackbone:
    """One backbone for several runs; the models that it gives hold the same tensors.

    It is loaded as the run that needs most of it would load it: with the pooler if a head reads one, and with as many blocks as
    the deepest fusion reads. Heads come with the adapters. What a head has from the checkpoint instead is loaded as that run alone
    would load it, and then put onto the same backbone.

    Args:
        runs: The runs.

    Raises:
        OSError: If the model is neither a folder nor to be had from a hub.
        ValueError: If the runs name different backbones, or the backbone cannot be loaded, see `load_model`.
    """

    def __init__(self, runs: Sequence[Described]) -> None:
        _check_same(runs)
        depths = [run.depth for run in runs]
        self._depth = None if None in depths else max(depth for depth in depths if depth is not None)
        self._lead = min(runs, key=_rank)
        self._plain = self._load(self._lead)
        self._with_heads = {self._lead.recipe.task: self._plain}  # of tasks whose head is the checkpoint's
        self._tokenizers: dict[bool, PreTrainedTokenizerBase] = {}

    def model(self, run: Described) -> Any:
        """A run's model with its head, without the adapter."""
        task = run.recipe.task
        if run is self._lead:
            return twin(self._plain)
        if task.vocabulary_head:
            if task not in self._with_heads:
                self._with_heads[task] = stand_on(self._load(run), self._plain)
            return twin(self._with_heads[task])
        model = share_backbone(self._plain, task.auto_model, **task.head_options(run.labels))
        if _of_checkpoint(model, run.trained, self._lead.trained):
            return stand_on(self._load(run), self._plain)
        return model

    def tokenizer(self, run: Described) -> PreTrainedTokenizerBase:
        """A run's tokenizer; runs whose tokenizers are the same have one."""
        of_words = run.recipe.task.of_words
        if of_words not in self._tokenizers:
            self._tokenizers[of_words] = load_tokenizer(run.recipe.backbone, run.recipe.task)
        return self._tokenizers[of_words]

    def _load(self, run: Described) -> Any:
        named = run.recipe.adapter.get("modules_to_save") or ()
        return load_lower(run.recipe.backbone, run.recipe.task, run.labels, named, self._depth)[0]


def _rank(run: Described) -> int:
    """Of which run the model is loaded: of the lowest. Its backbone has the parts that those of the others have."""
    return _RANKS.get(run.recipe.task.peft_type or "", len(_RANKS))


def _of_checkpoint(model: Any, trained: Sequence[str], lead: Sequence[str]) -> bool:
    """Whether parameters of a model are neither its adapter's nor sure to be in the backbone as it was loaded.

    Args:
        model: A model that shares the backbone.
        trained: What its adapter brings.
        lead: What the adapter brings of the run for which the backbone was loaded: the checkpoint may lack that.
    """
    below = {id(p) for p in parameters_of(model.base_model)}
    return any(
        not _covered(name, trained) and (id(parameter) not in below or _covered(name, lead))
        for name, parameter in model.named_parameters()
    )


def _covered(parameter: str, modules: Sequence[str]) -> bool:
    return any(f".{name}." in f".{parameter}." for name in modules)


def _check_same(runs: Sequence[Described]) -> None:
    """Raises ValueError if two runs name different backbones."""
    first = runs[0]
    for run in runs[1:]:
        ours, theirs = (_identity(each.recipe.backbone) for each in (first, run))
        differing = [key for key in ours if ours[key] != theirs[key]]
        if differing:
            told = [", ".join(f"{key} {values[key]!r}" for key in differing) for values in (ours, theirs)]
            raise ValueError(
                f"{str(first.folder)!r} and {str(run.folder)!r} stand on different backbones ({told[0]}; and {told[1]}), and one pass "
                "is of one backbone. Predict with them in commands of their own."
            )


def _identity(backbone: BackboneRecipe) -> dict[str, Any]:
    values = backbone.model_dump()
    return {**values, "model": str(Path(backbone.model).resolve()) if Path(backbone.model).is_dir() else backbone.model}
