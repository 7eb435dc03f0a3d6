"""Layer fusion as a method of peft: adapters that read all layers of a frozen transformers model.

Importing the package registers the method with peft. A LoRA recipe becomes a fusion recipe by one word::

    from . import FusionConfig
    config = FusionConfig(fusion="dwatt", task_type="TOKEN_CLS")
    model = get_peft_model(backbone, config)

The names below load what they need when they are first used.
"""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False  # as typing has it, which takes as long to import as this package
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    from .backbone.quantization import quantization_config
    from .backbone.share import share_backbone
    from .backbone.truncate import cut_model, load_cut
    from .fusions import FUSIONS
    from .runs.answering import load_runs
    from .runs.exporting import export_model
    from .runs.predicting import load_run, predict
    from .runs.recipe import load_recipe
    from .runs.training import run_recipe
    from .states import LayerStateCache, StaleCacheError, cache_layer_states
    from .tuner import FusionConfig, FusionModel, depth_weights, use_adapter
    from .tuner.counts import count_trainable
    from .tuner.many import ManyAdapters

    __version__: str

# Where each public name is defined.
_HOME = {
    "FUSIONS": "fusions",
    "FusionConfig": "tuner",
    "FusionModel": "tuner",
    "LayerStateCache": "states",
    "ManyAdapters": "tuner.many",
    "StaleCacheError": "states",
    "cache_layer_states": "states",
    "count_trainable": "tuner.counts",
    "cut_model": "backbone.truncate",
    "depth_weights": "tuner",
    "export_model": "runs.exporting",
    "load_cut": "backbone.truncate",
    "load_recipe": "runs.recipe",
    "load_run": "runs.predicting",
    "load_runs": "runs.answering",
    "predict": "runs.predicting",
    "quantization_config": "backbone.quantization",
    "run_recipe": "runs.training",
    "share_backbone": "backbone.share",
    "use_adapter": "tuner",
}
PEFT = "peft"
_TUNER = f"{__name__}.tuner"  # importing it registers the method

__all__ = [
    "FUSIONS",
    "FusionConfig",
    "FusionModel",
    "LayerStateCache",
    "ManyAdapters",
    "StaleCacheError",
    "cache_layer_states",
    "count_trainable",
    "cut_model",
    "depth_weights",
    "export_model",
    "load_cut",
    "load_recipe",
    "load_run",
    "load_runs",
    "predict",
    "quantization_config",
    "run_recipe",
    "share_backbone",
    "use_adapter",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # looking it up takes longer than all the rest
        from importlib.metadata import version

        return globals().setdefault(name, version("fusion-adapters"))
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _AfterPeft:
    """Registers the method as soon as peft has been imported: `import fusion_adapters` alone then needs neither it nor torch.

    It stays until peft is imported: libraries ask before whether there is one (`importlib.util.find_spec`).
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != PEFT:
            return None
        for finder in [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                spec.loader = spec.loader and _ThenRegister(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None


class _ThenRegister:
    """Loads peft by its own loader, and registers the method."""

    def __init__(self, loader: Any, finder: _AfterPeft) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        importlib.import_module(_TUNER)


if PEFT in sys.modules:
    importlib.import_module(_TUNER)
else:
    sys.meta_path.insert(0, _AfterPeft())
