"""Modules with random weights that the checkpoint lacked, and that an adapter would neither train nor save."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ..backbone.base_tensors import WRAPPED
from ..backbone.blocks import LAYER_NAME, Backbone
from ..backbone.families import TRAINING_ONLY, has_new_head, input_embeddings, output_embeddings
from ..backbone.quantization import is_quantised
from ..backbone.walk import parameters_of

_LOADED = "_is_hf_initialized"  # what transformers' from_pretrained writes on a parameter that the checkpoint held


@dataclass
class Fresh:
    """What is fresh in a model, and left out by an adapter.

    Attributes:
        modules: Their names in the model, each the largest module in which nothing else lies.
        names: By which `modules_to_save` finds them and nothing else.
        bare: Parameters that `modules_to_save` cannot bring alone: of the model itself, of a module in whose name others end,
            and embeddings, which the output may share.
        known: Whether the model remembers what its checkpoint held, so that these are fresh for sure.
        in_use: Whether a head reads them; a bare model's pooler may go unread.
        output: Whether the output embeddings are all that is fresh: drawn anew, or made larger for more tokens.
    """

    modules: list[str]
    names: list[str]
    bare: list[str]
    known: bool
    in_use: bool
    output: bool


def find_fresh(model: nn.Module, backbones: Sequence[Backbone], saved: Iterable[str]) -> Fresh:
    """Looks for parameters with fresh values that are in none of the modules to save.

    A model that was loaded knows which of its parameters the checkpoint held. Of these it lacked, those with one value
    throughout (norms and biases at their start) are the same after each load. A model from a configuration, or a copy, knows
    nothing: there, what lies outside of the backbone and shares nothing with it is fresh if pre-training knows no such head.

    Args:
        model: The model, with or without adapters.
        backbones: Its stacks.
        saved: Names as in `modules_to_save`.
    """
    plain = [(n, p) for p, n in {p: n for n, p in reversed([*_plain_parameters(model, "")])}.items()][::-1]  # once each
    base = backbones[0].base
    below = set(map(id, parameters_of(*([base] if base is not model else [b.root for b in backbones]))))
    known = any(_is_loaded(p) for _, p in plain) and all(
        _is_loaded(p) or p.is_meta or is_quantised(p)
        for block in backbones[0].blocks
        for _, p in _plain_parameters(block, "")
    )
    embeddings = getattr(input_embeddings(base), "weight", None)
    if known:
        new = [(n, p) for n, p in plain if not (_is_loaded(p) or p.is_meta or is_quantised(p))]
        certain = [
            (n, p) for n, p in new if n.rpartition(".")[2] not in TRAINING_ONLY and bool((p != p.flatten()[:1]).any())
        ]
    else:
        new = [(n, p) for n, p in plain if id(p) not in below and p is not embeddings]
        certain = new if has_new_head(model) else []
    left = {n: p for n, p in certain if not _is_saved(n, saved)}
    if not left:
        return Fresh([], [], [], known=known, in_use=False, output=False)
    whole = _wholly_fresh((n for n, _ in _plain_parameters(model, "")), {n for n, _ in new if not _is_saved(n, saved)})
    modules = {n: "" if p is embeddings else _largest(n.rpartition(".")[0], whole) for n, p in left.items()}
    names = _names_to_save(model, set(modules.values()))
    output = getattr(output_embeddings(model), "weight", None)
    return Fresh(
        modules=list(dict.fromkeys(m for m in modules.values() if m in names)),
        names=list(dict.fromkeys(names[m] for m in modules.values() if m in names)),
        bare=[n for n, m in modules.items() if m not in names],
        known=known,
        in_use=base is not model or any(id(p) not in below for p in left.values()),
        output=bool(left) and all(p is output for p in left.values()),
    )


def _names_to_save(model: nn.Module, modules: set[str]) -> dict[str, str]:
    """For each module the shortest name by whose end peft finds it and no other, as far as there is one."""
    there = [n for n, _ in _plain_modules(model, "")]
    found = {}
    for module in modules - {""}:
        parts = module.split(".")
        for end in (".".join(parts[-i:]) for i in range(1, len(parts) + 1)):
            if all(any(f"{n}.".startswith(f"{m}.") for m in modules) for n in there if n.endswith(end)):
                found[module] = end
                break
    return found


def _is_loaded(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, _LOADED, False))


def _is_saved(parameter: str, saved: Iterable[str]) -> bool:
    """Whether peft finds a module around the parameter by the end of its name."""
    return any(module.endswith(key) for module in _around(parameter) for key in saved)


def _wholly_fresh(parameters: Iterable[str], fresh: set[str]) -> set[str]:
    """The modules all of whose parameters, those that they share with others too, are among the fresh ones."""
    mixed = {m for n in parameters if n not in fresh for m in _around(n)}
    return {m for n in fresh for m in _around(n)} - mixed


def _around(parameter: str) -> list[str]:
    parts = parameter.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _largest(module: str, whole: set[str]) -> str:
    parts = module.split(".")
    return next((name for i in range(1, len(parts)) if (name := ".".join(parts[:i])) in whole), module)


def _plain_modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules with the names that they have without adapters, those of adapters left out."""
    inside = next((module._modules[n] for n in WRAPPED if module._modules.get(n) is not None), None)
    if inside is not None:
        yield from _plain_modules(inside, name)
        return
    yield name, module
    for part, child in module._modules.items():
        if child is not None and part != LAYER_NAME:
            yield from _plain_modules(child, f"{name}.{part}" if name else part)


def _plain_parameters(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters with these names; one that several modules share comes several times."""
    for where, part in _plain_modules(module, name):
        for own, parameter in part._parameters.items():
            if parameter is not None:
                yield f"{where}.{own}" if where else own, parameter
